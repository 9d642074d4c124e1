"""When PPO computes in bf16: asked of the model and the sampler, not only of the device."""

from dataclasses import replace
from pathlib import Path

import torch

from rlhf_exp.models.finetune import Full
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.stages.ppo import PPO
from tests.builders import tiny_policy
from tests.rl.test_objectives import SMALL, started
from tests.stages.test_ppo_run import parts

from .toy import ppo_with


def chosen(path: Path, ppo: PPO, *, bridge: bool = False, fp16: bool = False) -> torch.dtype | None:
    setup, _ = started(path, "ragged", Full(), SMALL)
    if bridge:
        setup = replace(setup, sampler=BridgeSampler(gen_len=3))
    if fp16:
        setup.policy.language_model.to(torch.float16)
    ppo.compute.prepare(setup)
    return setup.policy.autocast_dtype


def test_bf16_is_for_the_cached_sampler_and_for_weights_it_mixes_with(tmp_path: Path) -> None:
    bf16 = ppo_with(SMALL, dtype="bf16")
    assert chosen(tmp_path, bf16) == torch.bfloat16
    assert chosen(tmp_path, bf16, bridge=True) is None
    assert chosen(tmp_path, bf16, fp16=True) is None
    assert chosen(tmp_path, SMALL) is None


def problems(**replaced: object) -> list[str]:
    return ppo_with(dtype="bf16").check(parts(**replaced))


def test_what_excludes_bf16_is_told(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.language_model.save_pretrained(tmp_path)
    base = Pretrained(base_model=str(tmp_path), dtype="fp16")
    assert any("needs sampler=cached" in p for p in problems(sampler=BridgeSampler()))
    assert any("model.dtype=fp16 exclude" in p for p in problems(model=base))
    assert not any("stage.dtype" in p for p in problems())
