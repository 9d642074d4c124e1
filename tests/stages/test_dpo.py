"""DPO and IPO: they begin at the reference, learn what is preferred, and name bad input."""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.loading import Pretrained, load_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.dpo import DPO
from rlhf_exp.stages.pair_logprobs import PairLogprobs, ReferencedPairs
from rlhf_exp.stages.protocol import StageResult
from rlhf_exp.tasks.pair_tokens import encode_pairs
from rlhf_exp.tasks.pairs import PairsFile
from rlhf_exp.tasks.protocol import Pair, Split
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import WarmupDecay

from ..rl.toy import (
    WORDS,
    EchoTask,
    LowWords,
    OverlappingPairs,
    ToyPairs,
    ToyTask,
    context,
    parts_of,
    rows,
    saved_model,
)

SMALL = {"batch_size": 40, "log_every": 1, "eval_samples": 8}
KINDS = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=1),
    "lora": Lora(rank=4, alpha=8),
}


@dataclass(frozen=True)
class Obvious(ToyPairs):
    """Low words are preferred to high ones, after every prompt of two words."""

    def pair_split(self) -> Split[Pair]:
        pairs = [
            Pair(f"{a} {b}", f" {WORDS[(i + j) % 6]}", f" {WORDS[6 + (i * j) % 6]}")
            for i, a in enumerate(WORDS) for j, b in enumerate(WORDS)
        ]  # fmt: skip
        return Split(tuple(p for i, p in enumerate(pairs) if i % 3), tuple(pairs[::3]))

    def eval_prompts(self) -> tuple[str, ...]:
        return tuple(pair.prompt for pair in self.pair_split().held_out)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return saved_model(tmp_path_factory.mktemp("base"))


def train(
    path: Path,
    model: Pretrained,
    *,
    base_lr: float = 3e-3,
    seed: int = 1,
    parts: dict[str, Any] | None = None,
    **options: Any,
) -> StageResult:
    given, stage = context(path, seed), DPO(**{**SMALL, **options})
    optimizer = AdamWSettings(base_lr=base_lr)
    defaults = {"task": ToyPairs(), "model": model, "optimizer": optimizer, "reward": None}
    taken = parts_of(stage, **{**defaults, **(parts or {})})
    result = stage.run(given, taken)
    given.presentation.show()
    assert result.before is not None
    assert {*result.before} == {*result.after} == {*stage.metric_names(taken)}
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_reference_nothing_is_preferred(
    kind: str, tmp_path: Path, model: Pretrained
) -> None:
    before = train(tmp_path, model, parts={"finetune": KINDS[kind]}).before
    assert before["heldout/rewards/margins"] == before["heldout/rewards/chosen"] == 0
    assert before["heldout/rewards/accuracies"] == 0.5
    assert before["heldout/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert before["eval/kl"] == pytest.approx(0, abs=1e-6)
    first = rows(tmp_path)[1]  # batches of other pairs: equal up to rounding
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_it_learns_an_obvious_preference(
    loss: str, kind: str, tmp_path: Path, model: Pretrained
) -> None:
    result = train(
        tmp_path, model, loss=loss, epochs=8, eval_samples=48,
        parts={"task": Obvious(), "finetune": KINDS[kind], "reward": Keyword(keywords=WORDS[6:])},
    )  # fmt: skip
    before, after = result.before, result.after
    assert after["heldout/rewards/accuracies"] > 0.9 > 0.5 == before["heldout/rewards/accuracies"]
    assert after["heldout/loss"] < 0.8 * before["heldout/loss"]
    assert after["heldout/rewards/margins"] > 0.3
    assert after["eval/kl"] > 0.01
    logged = rows(tmp_path)
    assert logged[-2]["rewards/accuracies"] > 0.9
    saved = load_policy(tmp_path)
    pairs = encode_pairs(
        saved.tokenizer, Obvious().pair_split().held_out, ["?"] * 48, prepend_bos=True, limit=16
    )
    data = ReferencedPairs(pairs, saved, batch_size=40, dtype="fp32", device=torch.device("cpu"))
    chosen, rejected = data.all_logprobs(saved)
    assert chosen.mean().item() == pytest.approx(after["heldout/logps/chosen"], abs=1e-4)
    assert rejected.mean().item() == pytest.approx(after["heldout/logps/rejected"], abs=1e-4)
    num_tokens = sum(len(pair.chosen) for pair in pairs)
    nll = -chosen.sum().item() / num_tokens
    assert nll == pytest.approx(after["heldout/loss/sft"], abs=1e-4)
    assert num_tokens > len(pairs)


def test_it_learns_from_pairs_of_its_own(tmp_path: Path, model: Pretrained) -> None:
    result = train(
        tmp_path, model, resample_every=2, epochs=8, eval_samples=48,
        parts={"task": Obvious(), "reward": LowWords()},
    )  # fmt: skip
    assert result.after["eval/score"] > result.before["eval/score"] + 1
    logged = rows(tmp_path)
    made = [row for row in logged if "pairs/tie_fraction" in row]
    assert [row["phase"] for row in made] == [*range(0, 24, 2)]
    assert all(row["pairs/chosen_reward"] > row["pairs/rejected_reward"] for row in made)
    # Pairs of the policy as it is: its answers get better and better.
    assert made[-1]["pairs/rejected_reward"] > made[0]["pairs/chosen_reward"]


def output(policy: list[list[float]], reference: list[list[float]], **options: Any) -> Any:
    stage = DPO(**options)
    own, ref = (PairLogprobs(*torch.tensor(x, dtype=torch.float64)) for x in (policy, reference))
    return stage.loss_output(own, ref, num_tokens=5)


POLICY, REFERENCE = (
    [[-3.0, -2.0, -6.0], [-4.0, -1.0, -5.5]],
    [[-3.5, -1.0, -6.0], [-3.5, -1.5, -5.5]],
)


def test_metrics_by_hand() -> None:
    metrics = {k: v.item() for k, v in output(POLICY, REFERENCE, beta=0.5).metrics.items()}
    # Rewards are .25, -.5, 0 and -.25, .25, 0: the first pair is right, the second wrong, the third
    # a tie.
    losses = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.75)), math.log(2)]
    assert metrics == pytest.approx({
        "loss/preference": sum(losses) / 3,
        "loss/sft": 11 / 5,
        "rewards/chosen": -0.25 / 3,
        "rewards/rejected": 0.0,
        "rewards/margins": -0.25 / 3,
        "rewards/accuracies": 0.5,
        "logps/chosen": -11 / 3,
        "logps/rejected": -10.5 / 3,
    })  # fmt: skip
    right = output([[-1.0], [-2.0]], [[-2.0], [-2.0]]).metrics["rewards/accuracies"]
    wrong = output([[-3.0], [-2.0]], [[-2.0], [-2.0]]).metrics["rewards/accuracies"]
    assert (right, wrong) == (1, 0)


def test_the_loss_adds_the_weighted_log_probs_of_chosen_answers() -> None:
    for options in ({"loss": "ipo"}, {"label_smoothing": 0.2}, {"loss": "dpo", "beta": 0.3}):
        alone = output(POLICY, REFERENCE, **options)
        assert alone.loss == alone.metrics["loss/preference"]
        both = output(POLICY, REFERENCE, sft_coef=0.5, **options)
        assert both.loss.item() == pytest.approx(alone.loss.item() + 0.5 * 11 / 5)
    losses = {
        name: output(POLICY, REFERENCE, **options).loss.item()
        for name, options in {
            "dpo": {}, "smoothed": {"label_smoothing": 0.2}, "ipo": {"loss": "ipo"},
        }.items()
    }  # fmt: skip
    assert len({*losses.values()}) == 3
    # Mean of (1 - 5)^2, (-1.5 - 5)^2 and (0 - 5)^2, as 1 / (2 beta) = 5.
    assert losses["ipo"] == pytest.approx((16 + 42.25 + 25) / 3)
    # Mean of (1 - 1)^2, (-1.5 - 1)^2 and (0 - 1)^2.
    stronger = output(POLICY, REFERENCE, loss="ipo", beta=0.5)
    assert stronger.loss.item() == pytest.approx((6.25 + 1) / 3)


def test_the_sft_term_keeps_the_chosen_answers_likely(tmp_path: Path, model: Pretrained) -> None:
    for name, coef in (("none", 0.0), ("much", 1.0)):
        train(tmp_path / name, model, sft_coef=coef, epochs=4, parts={"task": Obvious()})
    none, much = (rows(tmp_path / name)[-1] for name in ("none", "much"))
    assert much["heldout/loss/sft"] < none["heldout/loss/sft"] - 0.1
    assert much["heldout/loss"] == pytest.approx(
        much["heldout/loss/preference"] + much["heldout/loss/sft"]
    )


def test_a_stronger_pull_stays_closer_to_the_reference(tmp_path: Path, model: Pretrained) -> None:
    kl = {}
    for beta in (0.05, 5.0):
        options = {"beta": beta, "epochs": 8, "eval_samples": 48}
        kl[beta] = train(tmp_path / f"{beta}", model, parts={"task": Obvious()}, **options)
    assert kl[5.0].after["eval/kl"] < 0.5 * kl[0.05].after["eval/kl"]


def test_evaluations_are_where_they_are_due(tmp_path: Path, model: Pretrained) -> None:
    for name, every, due in (("a", None, [0, 8]), ("b", 3, [0, 3, 6, 8]), ("c", 4, [0, 4, 8])):
        result = train(tmp_path / name, model, eval_every=every, epochs=2)
        evaluated = [row for row in rows(tmp_path / name) if "eval/kl" in row]
        assert [row["phase"] for row in evaluated] == due
        assert evaluated[0] == {"phase": 0, **result.before}
        assert evaluated[-1] == {"phase": 8, **result.after}
        samples = rows(tmp_path / name, "samples.jsonl")
        assert [s["phase"] for s in samples] == [phase for phase in due for _ in range(8)]
        trained = [row for row in rows(tmp_path / name) if "train/loss" in row]
        assert [row["phase"] for row in trained] == [*range(1, 9)]
    # Evaluations change nothing that is learned.
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def weights(path: Path) -> bytes:
    return (path / "model" / "model.safetensors").read_bytes()


def test_without_a_reward_there_is_no_score(
    tmp_path: Path, model: Pretrained, capsys: pytest.CaptureFixture[str]
) -> None:
    without = train(tmp_path / "without", model)
    scored = train(tmp_path / "with", model, parts={"reward": Keyword(keywords=["w7"])})
    assert {*scored.after} - {*without.after} == {"eval/score"}
    assert all("score" not in sample for sample in rows(tmp_path / "without", "samples.jsonl"))
    assert all("score" in sample for sample in rows(tmp_path / "with", "samples.jsonl"))
    assert {k: v for k, v in scored.after.items() if k != "eval/score"} == without.after
    assert "the same prompts, before and after" in capsys.readouterr().out
    assert (tmp_path / "without" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_another_task_may_evaluate(tmp_path: Path, model: Pretrained) -> None:
    sampler = CachedSampler(gen_len=4, stop_at_eos=True)
    result = train(tmp_path, model, eval_task=EchoTask(), parts={"sampler": sampler})
    assert {"eval/true_reward", "eval/exact_match", "eval/greedy_exact_match"} < {*result.after}
    assert "eval/reward_gap" not in result.after
    prompts = {sample["prompt"] for sample in rows(tmp_path, "samples.jsonl")}
    assert prompts <= {*EchoTask().eval_prompts()}
    stage = DPO(eval_task=EchoTask())
    [problem] = stage.check(parts_of(stage, task=ToyPairs(), model=model, reward=None))
    assert problem == "stage.eval_task has exact answers, which end: set sampler.stop_at_eos=true"


def test_two_runs_are_equal_and_another_seed_is_not(tmp_path: Path, model: Pretrained) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, model, seed=seed)
        torch.rand(3)
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_half_precision_trains_nearly_alike(tmp_path: Path, model: Pretrained) -> None:
    options = {"epochs": 3, "parts": {"task": Obvious()}}
    full, half = (
        train(tmp_path / dtype, model, dtype=dtype, **options) for dtype in ("fp32", "bf16")
    )
    assert half.before["heldout/rewards/margins"] == 0
    assert half.after != full.after
    assert half.after["heldout/loss"] == pytest.approx(full.after["heldout/loss"], rel=0.1)


def test_adapters_are_saved_and_merged(tmp_path: Path, model: Pretrained) -> None:
    train(tmp_path, model, parts={"finetune": KINDS["lora"]})
    assert (tmp_path / "model" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model" / "value_head.safetensors").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, model: Pretrained) -> None:
    with pytest.raises(TrainingError, match=r"^(update|phase) \d: .* (not finite|is nan|is inf)"):
        train(tmp_path, model, base_lr=1e30, epochs=2)


def problems(stage: DPO, **replaced: Any) -> list[str]:
    return stage.check(parts_of(stage, **{"task": ToyPairs(), "reward": None, **replaced}))


def test_what_does_not_fit_is_said(tmp_path: Path, model: Pretrained) -> None:
    stage = DPO()
    taken = parts_of(stage, task=ToyPairs(), model=model, reward=None)
    [problem] = stage.check_kinds({**vars(taken), "task": ToyTask()})
    assert problem == "stage=dpo needs preference pairs: task=pairs task.path=FILE"
    assert stage.check_kinds(vars(taken)) == []
    assert problems(stage, model=model) == []
    [problem] = problems(stage, model=Scratch(engine="hooked"))
    assert problem == "model.engine=hooked is for stage=ppo; stage=dpo trains with engine=fast"
    [problem] = problems(DPO(resample_every=4), model=model)
    assert problem.startswith("stage.resample_every=4 needs a reward to order the answers")
    assert problems(DPO(resample_every=4), model=model, reward=LowWords()) == []
    half = replace(model, dtype="bf16")
    [problem] = problems(stage, model=half)
    assert problem.startswith("model.dtype=bf16: weights that are trained must be fp32")
    assert problems(stage, model=half, finetune=Lora()) == []
    with pytest.raises(ConfigError, match=r"task.path=.*nowhere: no such file"):
        problems(stage, task=PairsFile(path=f"{tmp_path}/nowhere"))
    with pytest.raises(ConfigError, match="nowhere"):
        problems(stage, model=Pretrained(base_model=f"{tmp_path}/nowhere"))
    too_long = parts_of(stage, task=ToyPairs(), reward=None, schedule=WarmupDecay(warmup_steps=5))
    [problem] = stage.check_texts(too_long)
    assert problem.startswith("schedule.warmup_steps=5 must be below the number of updates")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 is for loss=dpo: set it 0"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"beta": 0}, "greater than 0"),
        ({"loss": "hinge"}, "'dpo' or 'ipo'"),
        ({"eval_task": 3}, "instance of Task"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DPO(**options)


@dataclass(frozen=True)
class Broken(ToyPairs):
    """Pairs that cannot be used."""

    answer: str = ""
    num_held_out: int | None = None

    def pair_split(self) -> Split[Pair]:
        train, held_out = super().pair_split()
        if self.answer:
            train = (*train[:3], replace_answer(train[3], self.answer), *train[4:])
        return Split(train, held_out[: self.num_held_out])


def replace_answer(pair: Pair, answer: str) -> Pair:
    return pair._replace(chosen=answer)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            Broken(answer=" nonsense"),
            "task.path: row 3, field chosen holds 'nonsense', which is not",
        ),
        (Broken(answer=" w1" * 20), "task.path: row 3, field chosen has 2. tokens after a prompt"),
        (Broken(num_held_out=0), "task.path: no pairs are held out: give at least one to measure"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(
    task: ToyPairs, message: str, tmp_path: Path, model: Pretrained
) -> None:
    unusable = tmp_path / "model"
    shutil.copytree(model.base_model, unusable)
    (unusable / "model.safetensors").write_bytes(b"no weights")  # it is named before they are read
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", Pretrained(base_model=str(unusable)), parts={"task": task})
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    saved = saved_model(tmp_path / "base")
    tokenizer = saved.language_model(None, seed=0)[1]
    tokenizer.eos_token = None
    tokenizer.save_pretrained(saved.base_model)
    with pytest.raises(ConfigError, match="stage=dpo needs a tokenizer with an EOS"):
        train(tmp_path / "run", saved)


def test_held_out_prompts_that_are_trained_on_are_told(
    tmp_path: Path, model: Pretrained, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "a", model)
    assert "trained on too" not in caplog.text
    train(tmp_path / "b", model, parts={"task": OverlappingPairs()})
    assert "of 80 held-out pairs have a prompt that is trained on too" in caplog.text
