"""A model that was saved with other weights than it was trained to ends no run as done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_exp.models.finetune import Lora
from rlhf_exp.models.loading import VALUE_HEAD_FILE
from rlhf_exp.models.reward_model import HEAD_FILE, HeadShape, RewardModel, save_reward_model
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.stages.check_saved import (
    check_saved_classifier,
    check_saved_language_model,
    check_saved_policy,
    check_saved_reward_model,
)

from ..architectures import build
from ..builders import build_tokenizer, stretch, tiny_policy
from ..rl.toy import context
from .test_every_stage_resumes import STAGES

WEIGHTS = "model.safetensors"
WRONG = r"^.*model: the saved model is not the trained one: "


def rewrite(file: Path, change: Callable[[Tensor], Tensor], *, name: str = "") -> None:
    """Changes the tensors of the file whose names end so."""
    tensors = {
        key: change(tensor) if key.endswith(name) else tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    policy = tiny_policy("llama")
    return policy, save_policy(policy, tmp_path / "model")


def test_one_matrix_with_other_weights_is_refused(saved: tuple[Any, Path]) -> None:
    check_saved_policy(*saved)
    rewrite(saved[1] / WEIGHTS, lambda x: x.flip(0), name="layers.1.mlp.down_proj.weight")
    with pytest.raises(TrainingError, match=WRONG + r"its logits differ at \d+ of 64 tokens\nDo"):
        check_saved_policy(*saved)


def test_a_head_with_other_weights_is_refused(saved: tuple[Any, Path]) -> None:
    rewrite(saved[1] / VALUE_HEAD_FILE, lambda x: x + 1e-6, name="2.bias")
    with pytest.raises(TrainingError, match=WRONG + r"value_head\.safetensors holds other weights"):
        check_saved_policy(*saved)
    (saved[1] / VALUE_HEAD_FILE).unlink()
    with pytest.raises(TrainingError, match=WRONG + r"value_head\.safetensors cannot be read"):
        check_saved_policy(*saved)


def test_a_reward_models_head_with_other_weights_is_refused(tmp_path: Path) -> None:
    policy = tiny_policy("llama")
    head = HeadShape(kind="token_sum", width=6, read_layers=1, prepend_bos=True)
    model = RewardModel(CausalTransformer(policy.language_model, policy.tokenizer), head)
    path = save_reward_model(model, tmp_path / "model")
    check_saved_reward_model(model, path)
    rewrite(path / HEAD_FILE, lambda x: x + 1e-3, name="score.bias")
    with pytest.raises(TrainingError, match=WRONG + r"reward_head\.safetensors holds other"):
        check_saved_reward_model(model, path)


def test_a_configuration_that_computes_something_else_is_refused(saved: tuple[Any, Path]) -> None:
    config = saved[1] / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"hidden_act": "silu"', '"hidden_act": "relu"'))
    assert config.read_text() != text
    with pytest.raises(TrainingError, match=WRONG + "its logits differ"):
        check_saved_policy(*saved)


def test_a_folder_that_cannot_be_read_is_refused(saved: tuple[Any, Path]) -> None:
    weights = saved[1] / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(TrainingError, match=WRONG + r"it cannot be read again: model\.base_model"):
        check_saved_policy(*saved)
    with pytest.raises(TrainingError, match=WRONG + r"it cannot be read again: reward\.name"):
        check_saved_classifier(saved[0].language_model, saved[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_other_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    network = build("mixtral").to(dtype)
    network.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    check_saved_language_model(network, tmp_path / "model")
    rewrite(tmp_path / "model" / WEIGHTS, lambda x: -x, name="lm_head.weight")
    with pytest.raises(TrainingError, match=WRONG + "its logits differ at 64 of 64 tokens"):
        check_saved_language_model(network, tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_adapters_are_the_trained_model(dtype: torch.dtype, tmp_path: Path) -> None:
    policy = tiny_policy("llama")
    policy.language_model.to(dtype)
    Lora(rank=2).attach(policy, seed=0)
    stretch(torch.nn.ParameterList(p for p in policy.parameters() if p.requires_grad), seed=1)
    path = save_policy(policy, tmp_path / "model")
    check_saved_policy(policy, path)
    policy.language_model.save_pretrained(path)  # which leaves the adapters out
    with pytest.raises(TrainingError, match=WRONG):
        check_saved_policy(policy, path)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["sft on texts", "classifier", "reward_model", "ppo"])
def test_a_stage_that_saved_something_else_fails_and_can_save_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, _ = STAGES[name]
    save = hf.PreTrainedModel.save_pretrained

    def broken(self: Any, path: Path, **options: Any) -> None:
        save(self, path, **options)
        rewrite(Path(path) / WEIGHTS, torch.zeros_like)

    base, run = tmp_path / "base", tmp_path / "run"
    stage(context(tmp_path / "whole"), base)
    with monkeypatch.context() as patch:
        patch.setattr(hf.PreTrainedModel, "save_pretrained", broken)
        with pytest.raises(TrainingError, match=WRONG):
            stage(context(run), base)
    assert (run / "model" / WEIGHTS).is_file()
    assert [*(run / "checkpoints").iterdir()]
    stage(context(run, resume=True), base)
    assert (run / "model" / WEIGHTS).read_bytes() == (
        tmp_path / "whole" / "model" / WEIGHTS
    ).read_bytes()
