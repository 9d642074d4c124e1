"""Training of a reward model: it ranks what can be ranked, keeps the best, and serves as reward."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.models.loading import Pretrained, load_language_model
from rlhf_exp.models.reward_model import load_reward_model
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.reward_model import LearnedReward
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.pair_data import FeaturePairs, error_metrics, pair_loss, pair_metrics
from rlhf_exp.stages.reward_model import TrainRewardModel
from rlhf_exp.tasks.pair_tokens import collate, encode_pairs
from rlhf_exp.tasks.pairs import PairsFile, hold_out
from rlhf_exp.tasks.protocol import Pair
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import WarmupDecay

from ..rl.toy import OverlappingPairs, ToyPairs, ToyTask, context, parts_of, rows, saved_model

SMALL = {"width": 16, "batch_size": 40, "epochs": 4, "eval_every": 4, "log_every": 1}
LEARNS = {**SMALL, "epochs": 12, "eval_every": 20, "patience": 9}
MANY = ToyPairs(count=900)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return saved_model(tmp_path_factory.mktemp("base"))


def train(
    path: Path, model: Pretrained, *, task: Any = None, seed: int = 1, **options: Any
) -> dict[str, float]:
    given, stage = context(path, seed), TrainRewardModel(**{**SMALL, **options})
    optimizer = AdamWSettings(head_lr=1e-2, base_lr=1e-3)
    taken = parts_of(stage, task=task or ToyPairs(), model=model, optimizer=optimizer)
    metrics = dict(stage.run(given, taken).after)
    given.presentation.show()
    # All of them, but for one that pairs without rewards do not have.
    names = {*stage.metric_names(taken)}
    assert names - {"heldout/spearman"} <= {*metrics} <= names
    return metrics


def losses(path: Path, name: str = "train/loss") -> list[float]:
    return [row[name] for row in rows(path) if name in row]


def data_of(path: Path, pairs: tuple[Pair, ...]) -> FeaturePairs:
    """The pairs and the model that a run saved."""
    scorer = load_reward_model(path)
    encoded = encode_pairs(
        scorer.backbone.tokenizer, pairs, ["?"] * len(pairs), prepend_bos=True, limit=16
    )
    return FeaturePairs(scorer, encoded, keep_features=False, dtype="fp32")


def halves(task: ToyPairs) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Held-out pairs to stop by and to report."""
    split = hold_out(
        task.pair_split().held_out, fraction=0.5, salt="stop 1", prompt_of=lambda p: p.prompt
    )
    return split.train, split.held_out


@pytest.fixture(scope="module")
def learned(
    tmp_path_factory: pytest.TempPathFactory, model: Pretrained
) -> tuple[Path, dict[str, float]]:
    path = tmp_path_factory.mktemp("learned")
    return path, train(path, model, task=MANY, **LEARNS)


def test_it_learns_rewards_that_words_add_up_to(learned: tuple[Path, dict[str, float]]) -> None:
    path, after = learned
    assert after["heldout/pair_accuracy"] > 0.85
    assert after["heldout/spearman"] > 0.75
    assert after["heldout/mse"] < 0.45 * after["heldout/reward_variance"]
    assert losses(path)[-1] < 0.4 * losses(path)[0]


def test_the_last_state_learns_an_order_alone(tmp_path: Path, model: Pretrained) -> None:
    task = ToyPairs(count=900, rewarded=False)
    after = train(tmp_path, model, task=task, **LEARNS, head="last_token", loss="rank")
    assert after["heldout/pair_accuracy"] > 0.75
    assert set(after) == {"heldout/pair_accuracy", "heldout/rank_loss"}
    train_scores = data_of(tmp_path, MANY.pair_split().train).all_scores()
    assert torch.cat(train_scores).mean().item() == pytest.approx(0, abs=1e-4)
    assert torch.cat(train_scores).std() > 0.5


def test_rewards_that_are_known_are_not_read_by_the_rank_loss(
    tmp_path: Path, model: Pretrained
) -> None:
    for name, rewarded in (("a", True), ("b", False)):
        train(tmp_path / name, model, task=ToyPairs(rewarded=rewarded), loss="rank")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    # They are reported all the same.
    assert "heldout/spearman" in rows(tmp_path / "a")[-1]
    assert "heldout/mse" not in rows(tmp_path / "a")[-1]  # the scores have a scale of their own
    scores = data_of(tmp_path / "a", ToyPairs().pair_split().train).all_scores()
    assert torch.cat(scores).mean().item() == pytest.approx(0, abs=1e-4)


def test_the_first_scores_are_around_the_mean_reward(tmp_path: Path, model: Pretrained) -> None:
    train(tmp_path, model, batch_size=1000, epochs=1, rank_coef=0.0)
    rewards = torch.tensor([p[3:5] for p in ToyPairs().pair_split().train]).flatten()
    # A head that says the mean would have the variance as its loss; one at 0 the mean square.
    first = losses(tmp_path)[0]
    assert first == pytest.approx(rewards.var(correction=0).item(), rel=0.25)
    assert first < 0.6 * rewards.square().mean()


def test_the_first_loss_is_the_errors_plus_the_weighted_rank_loss(
    tmp_path: Path, model: Pretrained
) -> None:
    whole = {"batch_size": 1000, "epochs": 1}
    for rank_coef in (0.0, 1.0, 5.0):
        train(tmp_path / f"{rank_coef}", model, rank_coef=rank_coef, **whole)
    none, one, five = (losses(tmp_path / name)[0] for name in ("0.0", "1.0", "5.0"))
    assert five - none == pytest.approx(5 * (one - none), rel=1e-4)
    train(tmp_path / "rank", model, loss="rank", **whole)
    assert one - none == pytest.approx(losses(tmp_path / "rank")[0], rel=1e-4)


def test_the_head_is_drawn_from_the_runs_seed(tmp_path: Path, model: Pretrained) -> None:
    # One batch of all pairs: nothing else of the first loss depends on the seed.
    for seed in (1, 2):
        train(tmp_path / f"{seed}", model, seed=seed, batch_size=1000, epochs=1)
    assert losses(tmp_path / "1")[0] != pytest.approx(losses(tmp_path / "2")[0], rel=1e-3)


def test_kept_and_recomputed_features_train_alike(tmp_path: Path, model: Pretrained) -> None:
    for name, keep in (("kept", True), ("fresh", False)):
        train(tmp_path / name, model, keep_features=keep)
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "fresh"), rel=1e-3)
    held_out = ToyPairs().pair_split().held_out
    for a, b in zip(
        *(data_of(tmp_path / n, held_out).all_scores() for n in ("kept", "fresh")), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_half_precision_trains_nearly_alike(tmp_path: Path, model: Pretrained) -> None:
    for dtype in ("fp32", "bf16"):
        train(tmp_path / dtype, model, dtype=dtype)
    full, half = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert half != full
    assert half == pytest.approx(full, rel=0.1)


def test_the_language_model_is_saved_as_it_was(tmp_path: Path, model: Pretrained) -> None:
    train(tmp_path, model)
    before, after = (
        load_language_model(str(p))[0].state_dict() for p in (model.base_model, tmp_path)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("unfreeze_layers", [1, 2])
def test_unfrozen_blocks_are_trained_and_nothing_before_them(
    tmp_path: Path, model: Pretrained, unfreeze_layers: int
) -> None:
    train(tmp_path, model, unfreeze_layers=unfreeze_layers, keep_features=False, read_layers=1)
    before, after = (
        load_language_model(str(p))[0].state_dict() for p in (model.base_model, tmp_path)
    )
    changed = {n.split(".attn")[0] for n in before if not torch.equal(before[n], after[n])}
    changed = {".".join(name.split(".")[:3]) for name in changed}
    blocks = {f"transformer.h.{i}" for i in range(2 - unfreeze_layers, 2)}
    assert changed - {"transformer.ln_f.weight", "transformer.ln_f.bias"} == blocks
    assert "transformer.ln_f.weight" in changed
    assert "grad_norm/base" in rows(tmp_path)[0]


def test_halves_to_stop_by_and_to_report_share_no_prompt(tmp_path: Path, model: Pretrained) -> None:
    after = train(tmp_path, model)
    stop_by, report = halves(ToyPairs())
    assert not {p.prompt for p in stop_by} & {p.prompt for p in report}
    assert min(len(stop_by), len(report)) > 15
    samples = rows(tmp_path, "samples.jsonl")
    assert [(s["prompt"], s["chosen"]) for s in samples] == [(p.prompt, p.chosen) for p in report]
    data = data_of(tmp_path, report)
    scores = data.all_scores()
    measured = pair_metrics(scores, data.rewards) | error_metrics(scores, data.rewards)
    assert measured == pytest.approx(after, abs=1e-4)
    # What it was stopped by is measured on the other half, and the best of it was saved.
    data = data_of(tmp_path, stop_by)
    loss = pair_loss(data.all_scores(), data.rewards, rank_coef=0.1).item()
    assert loss == pytest.approx(min(losses(tmp_path, "heldout/loss")), abs=1e-4)


def test_training_ends_when_patience_does_and_the_best_is_saved(
    tmp_path: Path, model: Pretrained
) -> None:
    task = ToyPairs(count=90)
    stage = {"epochs": 500, "width": 64, "batch_size": 60, "eval_every": 1, "patience": 3}
    train(tmp_path, model, task=task, **stage)
    measured = losses(tmp_path, "heldout/loss")
    assert len(measured) < 500
    best = min(measured)
    assert measured.index(best) == len(measured) - 4
    data = data_of(tmp_path, halves(task)[0])
    loss = pair_loss(data.all_scores(), data.rewards, rank_coef=0.1).item()
    assert loss == pytest.approx(best, abs=1e-4)


def test_what_was_saved_is_the_reward_that_was_reported(
    learned: tuple[Path, dict[str, float]],
) -> None:
    path, after = learned
    reward = LearnedReward(path=str(path), batch_size=7).load(torch.device("cpu"))
    samples = rows(path, "samples.jsonl")
    _, report = halves(MANY)
    tokenizer = load_reward_model(path).backbone.tokenizer
    encoded = encode_pairs(tokenizer, report, ["?"] * len(report), prepend_bos=True, limit=16)
    width = max(max(len(e.chosen), len(e.rejected)) for e in encoded)
    scores = reward(collate(encoded, width=width, device=torch.device("cpu"))).tolist()
    written = [s[f"{name}_score"] for name in ("chosen", "rejected") for s in samples]
    assert scores == pytest.approx(written, abs=1e-4)
    right = sum(s["chosen_score"] > s["rejected_score"] for s in samples)
    assert right / len(samples) == pytest.approx(after["heldout/pair_accuracy"])
    assert all(s["chosen_reward"] == ToyPairs.reward(s["chosen"]) for s in samples)


@pytest.mark.parametrize("rewarded", [True, False])
def test_a_run_leaves_pictures_samples_a_table_and_a_model(
    tmp_path: Path, model: Pretrained, rewarded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = "mse_rank" if rewarded else "rank"
    after = train(tmp_path, model, task=ToyPairs(rewarded=rewarded), loss=loss, num_examples=2)
    for name in ("loss.png", "held_out.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "model" / "reward_head.safetensors").is_file()
    logged = rows(tmp_path)
    assert {k: v for k, v in logged[-1].items() if k != "phase"} == after
    assert ("chosen_reward" in rows(tmp_path, "samples.jsonl")[0]) is rewarded
    printed = capsys.readouterr().out
    shown = [s for s in rows(tmp_path, "samples.jsonl") if s["chosen"].strip() in printed]
    assert f"{shown[0]['chosen_score']:.2f}" in printed
    assert printed.count("├") == 1  # a rule between two pairs


def test_two_runs_are_equal_and_another_seed_is_not(tmp_path: Path, model: Pretrained) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, model, seed=seed)
        torch.rand(3)
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")
    heads = [(tmp_path / n / "model" / "reward_head.safetensors").read_bytes() for n in "abc"]
    assert heads[0] == heads[1] != heads[2]


def test_errors_are_measured_only_where_rewards_are_known(
    tmp_path: Path, model: Pretrained
) -> None:
    task = ToyPairs(rewarded=False)
    message = "stage.loss=mse_rank needs the columns chosen_reward and rejected_reward"
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, model, task=task)
    assert not [*tmp_path.iterdir()]

    def check(stage: TrainRewardModel, **replaced: Any) -> list[str]:
        return stage.check_texts(parts_of(stage, **replaced))

    assert check(TrainRewardModel(), task=task)[0].startswith(message)
    assert not check(TrainRewardModel(loss="rank"), task=task)
    assert not check(TrainRewardModel(), task=ToyPairs())
    [problem] = check(
        TrainRewardModel(epochs=1), task=ToyPairs(), schedule=WarmupDecay(warmup_steps=2)
    )
    assert problem.startswith("schedule.warmup_steps=2 must be below the number of updates")


def test_features_that_change_are_not_kept() -> None:
    with pytest.raises(ValidationError, match="unfreeze_layers=1 changes the features: set keep"):
        TrainRewardModel(unfreeze_layers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"read_layers": 3}, "stage: the model has 2 blocks, fewer than read_layers"),
        (
            {"unfreeze_layers": 3, "keep_features": False},
            "stage: the model has 2 blocks, fewer than unfreeze_layers",
        ),
    ],
)
def test_more_layers_than_there_are_is_refused(
    tmp_path: Path, model: Pretrained, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, model, **options)
    assert not [*tmp_path.iterdir()]


def test_held_out_pairs_that_cannot_be_halved_are_refused(
    tmp_path: Path, model: Pretrained
) -> None:
    class OneHeldOut(ToyPairs):
        def pair_split(self):  # type: ignore[no-untyped-def]
            split = super().pair_split()
            return type(split)(split.train, split.held_out[:1])

    message = "task.path: 1 held-out pairs are too few to stop by one half and report the other"
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, model, task=OneHeldOut())


def test_a_pair_that_the_model_cannot_read_is_named(tmp_path: Path) -> None:
    short = saved_model(tmp_path / "short", context_len=5)
    with pytest.raises(ConfigError, match=r"task.path: row \d+, field (chosen|rejected) has"):
        train(tmp_path / "run", short)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    saved = saved_model(tmp_path / "base")
    tokenizer = saved.language_model(None, seed=0)[1]
    tokenizer.eos_token = None
    tokenizer.save_pretrained(saved.base_model)
    with pytest.raises(ConfigError, match="stage=reward_model needs a tokenizer with an EOS"):
        train(tmp_path / "run", saved)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    stage = TrainRewardModel()
    taken = parts_of(stage, task=ToyPairs())
    [problem] = stage.check_kinds({**vars(taken), "task": ToyTask()})
    assert problem.startswith("stage=reward_model needs preference pairs: task=pairs")
    assert not stage.check(taken)
    [problem] = stage.check(replace(taken, model=Scratch(engine="hooked")))
    assert problem.startswith("model.engine=hooked is for stage=ppo")
    with pytest.raises(ConfigError, match=r"task.path=.*nowhere: no such file"):
        stage.check(replace(taken, task=PairsFile(path=f"{tmp_path}/nowhere")))


def test_held_out_prompts_that_are_trained_on_are_told(
    tmp_path: Path, model: Pretrained, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "a", model)
    assert "trained on too" not in caplog.text
    train(tmp_path / "b", model, task=OverlappingPairs())
    assert "of 80 held-out pairs have a prompt that is trained on too" in caplog.text
