"""A run that was interrupted goes on to the very numbers of one that was not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.loading import Pretrained, load_policy
from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.settings import ConfigError, settings
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.stages.protocol import StageResult
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import WarmupDecay
from rlhf_exp.types import Completions

from ..builders import assert_near
from ..rl.toy import RAGGED, context, parts, ppo_with, rows, saved_model

pytestmark = pytest.mark.usefixtures("unchecked")

KINDS = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=1),
    "lora": Lora(rank=4, alpha=8),
}
# Four prompts in batches of nine: batches end within an order of the prompts.
PHASES = ppo_with(
    total_phases=3,
    batch_size=9,
    num_minibatches=3,
    eval_every=2,
    eval_samples=6,
    checkpoint_every=1,
    dtype="fp32",
)
FILES = ("model.safetensors", "value_head.safetensors", "config.json", "tokenizer.json")


@settings
class Failing:
    """Counts low words, and raises at the call of that number."""

    at: int | None = None
    interrupted: bool = True

    def load(self, device: torch.device) -> RewardFunction:
        calls = iter(range(1, 1000))

        def score(completions: Completions) -> torch.Tensor:
            if next(calls) == self.at:
                raise KeyboardInterrupt if self.interrupted else RewardError("the judge is gone")
            texts = [text.split() for text in completions.texts]
            return torch.tensor([float(sum(word < "w6" for word in words)) for words in texts])

        return score


def run(
    path: Path, ppo: PPO, model: Pretrained, *, resume: bool = False, **replaced: Any
) -> StageResult:
    defaults = {
        "task": RAGGED,
        "model": model,
        "reward": Failing(),
        "sampler": CachedSampler(gen_len=4, stop_at_eos=True),
        "schedule": WarmupDecay(warmup_steps=2),
        "optimizer": AdamWSettings(base_lr=1e-2, head_lr=1e-2),
    }
    return ppo.run(context(path, resume=resume), parts(**{**defaults, **replaced}))


def timeless(path: Path) -> list[str]:
    """The lines of metrics.jsonl and samples.jsonl, times left out."""
    metrics = [
        repr({k: v for k, v in row.items() if not k.startswith("time/")}) for row in rows(path)
    ]
    return [*metrics, *(path / "samples.jsonl").read_text().split("\n")]


def files(path: Path) -> dict[str, bytes]:
    """The files of the saved model by their names."""
    folder = path / "model"
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_resume_is_exact(path: Path, ppo: PPO, *, at: int) -> None:
    """A run that is cut at that call of the reward and resumed ends as one that is not."""

    def train(folder: str, *, resume: bool = False, at: int | None = None) -> None:
        given = parts(task=RAGGED, reward=Failing(at=at))
        ppo.run(context(path / folder, resume=resume), given)

    train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("cut", at=at)
    train("cut", resume=True)
    assert timeless(path / "cut") == timeless(path / "whole")
    assert files(path / "cut") == files(path / "whole")


# Each reference; in `make soak` LoRA, which finds its layers by name, on every architecture.
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("gpt2", "full"),
        ("gpt_neox", "last_layers"),
        ("llama", "lora"),
        *(
            pytest.param(architecture, kind, marks=pytest.mark.soak)
            for architecture, kind in (
                ("llama", "last_layers"),
                ("gpt2", "lora"),
                ("qwen2", "lora"),
                ("gpt_neox", "lora"),
            )
        ),
    ],
)
def test_a_run_goes_on_bit_by_bit(architecture: str, kind: str, tmp_path: Path) -> None:
    model = saved_model(tmp_path / "base", architecture=architecture)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uncut = run(whole, PHASES, model, finetune=KINDS[kind])
    with pytest.raises(KeyboardInterrupt):  # two evaluations and two phases before
        run(cut, PHASES, model, finetune=KINDS[kind], reward=Failing(at=5))
    assert [row["phase"] for row in rows(cut)] == [0, 1, 2, 2]
    assert not (cut / "model").exists()
    resumed = run(cut, PHASES, model, finetune=KINDS[kind], resume=True)

    assert [row["phase"] for row in rows(cut)] == [0, 1, 2, 2, 3, 3]
    assert timeless(cut) == timeless(whole)
    assert files(cut) == files(whole)
    adapter = {f"adapter/adapter_{name}" for name in ("config.json", "model.safetensors")}
    assert files(cut).keys() >= ({*FILES} | (adapter if kind == "lora" else set()))
    for name in ("before", "after", "memory"):
        assert resumed.content()[name] == uncut.content()[name]
    assert resumed.before != resumed.after
    phases = sorted(int(p.name[-6:]) for p in (cut / "checkpoints").iterdir())
    best = max(rows(cut), key=lambda row: (row.get("eval/score", -1), -row["phase"]))["phase"]
    assert phases == sorted({2, 3} | ({best} - {0}))

    policy = load_policy(cut)
    other = AutoModelForCausalLM.from_pretrained(cut / "model").eval()
    tokens = torch.tensor([[1, 4, 5, 6]])
    with torch.no_grad():
        assert_near(policy(tokens)[0], other(input_ids=tokens).logits, tolerance=1e-6)
        start = load_policy(tmp_path / "base")(tokens)[0]
        assert (policy(tokens)[0] - start).abs().max() > 1e-3
        assert_near(policy(tokens)[0], policy.hooked()(tokens, return_type="logits"))


@pytest.mark.parametrize(("at", "phases"), [(5, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 3])])
def test_what_was_logged_after_the_checkpoint_is_written_again(
    at: int, phases: list[int], tmp_path: Path
) -> None:
    model = saved_model(tmp_path / "base", num_layers=1)
    ppo = ppo_with(
        total_phases=5, batch_size=9, num_minibatches=1, eval_every=3, eval_samples=6,
        checkpoint_every=2,
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, ppo, model)
    with pytest.raises(RewardError, match=r"^phase \d: the judge is gone$"):
        # The calls: an evaluation, three phases, an evaluation, two phases, an evaluation.
        run(cut, ppo, model, reward=Failing(at=at, interrupted=False))
    assert [row["phase"] for row in rows(cut)] == phases
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"phase": 4, "objec')  # the power went off
    # A second interruption on the way.
    with pytest.raises(KeyboardInterrupt):
        run(cut, ppo, model, resume=True, reward=Failing(at=3))
    run(cut, ppo, model, resume=True)
    assert timeless(cut) == timeless(whole)
    assert files(cut) == files(whole)


def test_a_finished_run_is_only_saved_again(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "base", num_layers=1)
    run(tmp_path / "run", PHASES, model)
    before = timeless(tmp_path / "run"), files(tmp_path / "run")
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    run(tmp_path / "run", PHASES, model, resume=True)
    assert (timeless(tmp_path / "run"), files(tmp_path / "run")) == before


def test_a_run_without_checkpoints_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = saved_model(tmp_path / "base", num_layers=1)
    none = ppo_with(total_phases=2, batch_size=6, num_minibatches=1, checkpoint_every=None)
    given = {"schedule": WarmupDecay(warmup_steps=1)}
    run(tmp_path / "run", none, model, **given)
    assert not (tmp_path / "run" / "checkpoints").exists()
    before = timeless(tmp_path / "run"), files(tmp_path / "run")
    run(tmp_path / "run", none, model, resume=True, **given)
    assert "no checkpoint was written yet: from the beginning" in caplog.text
    assert (timeless(tmp_path / "run"), files(tmp_path / "run")) == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    one, other = (
        saved_model(tmp_path / str(width), num_layers=1, d_model=width) for width in (16, 8)
    )
    run(tmp_path / "run", PHASES, one)
    before = timeless(tmp_path / "run")
    weights = "the checkpoint is of a model with other trained weights"
    changed = "model: the files that it names have changed since the checkpoint"
    for model, kind, message in (
        (other, "full", changed), (one, "last_layers", weights), (one, "lora", weights),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "run", PHASES, model, resume=True, finetune=KINDS[kind])
    # And nothing of the run is lost by that.
    assert timeless(tmp_path / "run") == before
