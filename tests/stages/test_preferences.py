"""Preference pairs: the better answer is chosen, ties are counted, held-out prompts are new."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.saving import save_policy
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rewards.length import Length
from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import ConfigError, settings
from rlhf_exp.stages import preferences
from rlhf_exp.stages.preferences import Preferences, as_pair, have_ended, split_prompts
from rlhf_exp.stages.protocol import StageResult
from rlhf_exp.tasks.labelled_text import LabelledTextFile
from rlhf_exp.tasks.pairs import PairsFile
from rlhf_exp.tasks.protocol import Pair
from rlhf_exp.types import Completions, PromptBatch

from ..rl.toy import WORDS, Echoed, EchoTask, ToyTask, context, echo_policy, parts_of, rows

SAMPLER = CachedSampler(gen_len=3, stop_at_eos=True)
STAGE = Preferences(num_pairs=50, num_held_out=20, batch_size=32)
TWO_WORDS = ToyTask(prompts=tuple(f"{a} {b}" for a in WORDS for b in WORDS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    path = tmp_path_factory.mktemp("echo")
    save_policy(echo_policy(), path)
    return Pretrained(base_model=str(path))


def make(
    path: Path, model: Pretrained, stage: Preferences = STAGE, *, seed: int = 1, **replaced: Any
) -> StageResult:
    defaults = {"task": EchoTask(), "reward": Echoed(), "sampler": SAMPLER}
    return stage.run(context(path, seed), parts_of(stage, model=model, **{**defaults, **replaced}))


def pairs(path: Path, name: str) -> list[Pair]:
    return [Pair(**row) for row in rows(path / "pairs", f"{name}.jsonl")]


def test_the_better_answer_to_the_prompt_is_chosen(tmp_path: Path, model: Pretrained) -> None:
    result = make(tmp_path, model).after
    assert {*result} == {*STAGE.metric_names(parts_of(STAGE))}
    train, held_out = pairs(tmp_path, "train"), pairs(tmp_path, "test")
    assert (len(train), len(held_out)) == (50, 20)
    for pair in train + held_out:
        assert pair.chosen_reward == pytest.approx(EchoTask().true_reward(pair.prompt, pair.chosen))
        assert pair.rejected_reward == pytest.approx(
            EchoTask().true_reward(pair.prompt, pair.rejected)
        )
        assert pair.chosen_reward > pair.rejected_reward
    split = EchoTask().demonstration_split()
    assert {pair.prompt for pair in train} <= {d.prompt for d in split.train}
    assert {pair.prompt for pair in held_out} <= {d.prompt for d in split.held_out}
    # The policy gives the first word back, though not always: so both answers are to the prompt.
    begun = [pair.chosen.split()[0] == pair.prompt.split()[0] for pair in train]
    assert sum(begun) > 40
    [logged] = rows(tmp_path)
    assert logged == {"phase": result["pairs/prompts"], **result}
    assert rows(tmp_path, "samples.jsonl") == [{"phase": 0, **p._asdict()} for p in held_out]


def test_ties_are_left_out_and_counted(tmp_path: Path, model: Pretrained) -> None:
    stage = Preferences(num_pairs=1000, num_held_out=1, batch_size=96)
    result = make(tmp_path, model, stage).after
    kept = pairs(tmp_path, "train")
    assert len(kept) == 1000
    # Those of the last batches that are too many are no ties.
    usable = result["pairs/prompts"] - result["pairs/ties"]
    assert 1001 <= usable <= 1001 + 2 * 96
    assert result["pairs/prompts"] % 96 == 0
    assert result["pairs/tie_fraction"] == result["pairs/ties"] / result["pairs/prompts"] > 0.1
    for name in ("chosen", "rejected"):
        mean = sum(getattr(pair, f"{name}_reward") for pair in kept) / 1000
        assert result[f"pairs/{name}_reward"] == pytest.approx(mean, abs=0.02)


def test_answers_end_where_they_say(tmp_path: Path, model: Pretrained) -> None:
    make(tmp_path, model)
    texts = [(p.chosen, p.chosen_ended) for p in pairs(tmp_path, "train")]
    texts += [(p.rejected, p.rejected_ended) for p in pairs(tmp_path, "train")]
    # Of three tokens a text of fewer words ended, or holds a special token that it does not show.
    assert all(ended for text, ended in texts if len(text.split()) == 1)
    assert not any(ended for text, ended in texts if len(text.split()) == 3)
    assert len({ended for _, ended in texts}) == 2


def test_the_pairs_are_those_of_the_seed(tmp_path: Path, model: Pretrained) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tmp_path / name, model, seed=seed)
        torch.rand(3)
    a, b, c = (pairs(tmp_path / name, "train") for name in "abc")
    assert a == b != c
    assert pairs(tmp_path / "a", "test") == pairs(tmp_path / "b", "test")


def test_parquet_holds_the_same_pairs_and_both_are_read_as_a_task(
    tmp_path: Path, model: Pretrained
) -> None:
    make(tmp_path / "jsonl", model)
    make(tmp_path / "parquet", model, Preferences(**{**vars(STAGE), "format": "parquet"}))
    lines, columns = (
        PairsFile(path=str(tmp_path / name), prepend_bos=True).pair_split()
        for name in ("jsonl", "parquet")
    )
    assert lines == columns
    assert list(lines.train) == pairs(tmp_path / "jsonl", "train")
    assert list(lines.held_out) == pairs(tmp_path / "jsonl", "test")


def test_where_nothing_differs_the_run_ends(
    tmp_path: Path, model: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preferences, "MIN_TRIED", 64)
    message = "of 64 prompts only 0 gave two answers of different reward; raise sampler.temp"
    with pytest.raises(TrainingError, match=message):
        make(tmp_path, model, reward=Keyword(keywords=["absent"]))
    assert not (tmp_path / "pairs").exists()


def test_few_usable_pairs_are_enough_if_they_are_a_hundredth(
    tmp_path: Path, model: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preferences, "MIN_TRIED", 32)
    monkeypatch.setattr(preferences, "MIN_USABLE", 0.9)
    with pytest.raises(TrainingError, match=r"of 32 prompts only \d+ gave"):
        make(tmp_path, model)
    monkeypatch.setattr(preferences, "MIN_USABLE", 0.05)
    make(tmp_path, model)


@settings
class Broken:
    """A reward that is not finite."""

    def load(self, device: torch.device) -> RewardFunction:
        return lambda completions: torch.full((len(completions.texts),), torch.nan)


def test_a_reward_that_is_not_finite_stops_the_run(tmp_path: Path, model: Pretrained) -> None:
    with pytest.raises(TrainingError, match="the reward gave nan for 64 of 64 samples"):
        make(tmp_path, model, reward=Broken())


def test_parts_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, model: Pretrained
) -> None:
    with pytest.raises(ConfigError, match=r"sampler.gen_len=14 exceed the model's context of 16"):
        make(tmp_path, model, sampler=CachedSampler(gen_len=14))
    assert not [*tmp_path.iterdir()]


def test_a_task_whose_file_is_missing_is_refused() -> None:
    endless, ending = CachedSampler(), CachedSampler(stop_at_eos=True)
    assert STAGE.check(parts_of(STAGE, sampler=ending)) == []
    [problem] = STAGE.check(parts_of(STAGE, sampler=endless))
    assert "set sampler.stop_at_eos=true" in problem
    missing = LabelledTextFile(path="nowhere.jsonl")
    with pytest.raises(ConfigError, match="nowhere"):
        STAGE.check(parts_of(STAGE, task=missing, sampler=ending))


def test_half_precision_samples_too(tmp_path: Path, model: Pretrained) -> None:
    stage = Preferences(**{**vars(STAGE), "dtype": "bf16"})
    make(tmp_path, model, stage, reward=Length(target_tokens=1))
    assert len(pairs(tmp_path, "train")) == 50


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((" a", 2.0, True), (" b", 1.0, False), (" a", " b", 2.0, 1.0, True, False)),
        ((" a", 1.0, True), (" b", 2.0, False), (" b", " a", 2.0, 1.0, False, True)),
        ((" a", -2.0, True), (" b", -1.5, True), (" b", " a", -1.5, -2.0, True, True)),
        ((" a", 1.0, True), (" b", 1.0, True), None),
        ((" a", 2.0, True), (" a", 1.0, False), None),
        ((" a", 2.0, True), ("", 1.0, True), (" a", "", 2.0, 1.0, True, True)),
    ],
)
def test_two_answers_as_a_pair(first: tuple, second: tuple, expected: tuple | None) -> None:
    assert as_pair("p", first, second) == (None if expected is None else Pair("p", *expected))


def test_an_answer_has_ended_if_its_last_real_token_is_eos() -> None:
    tokens = torch.tensor([[5, 2, 0], [5, 6, 2], [5, 6, 7], [5, 2, 2], [2, 5, 0], [2, 0, 0]])
    lengths = torch.tensor([2, 3, 3, 1, 2, 1])
    completions = Completions(
        prompts=PromptBatch(
            tokens=torch.ones(6, 1, dtype=torch.long),
            mask=torch.ones(6, 1, dtype=torch.bool),
            rows=({"prompt": ""},) * 6,
        ),
        tokens=tokens,
        mask=torch.arange(3) < lengths[:, None],
        texts=("",) * 6,
    )
    ended = have_ended(completions, ToyTask().build_tokenizer())
    assert ended.tolist() == [True, True, False, False, False, True]


def test_prompts_without_demonstrations_are_split_by_their_hash() -> None:
    train, held_out = split_prompts(TWO_WORDS, 0.1)
    assert sorted([*train, *held_out]) == sorted(TWO_WORDS.prompts)
    assert len(held_out) == round(0.1 * len(TWO_WORDS.prompts))
    backwards = ToyTask(prompts=TWO_WORDS.prompts[::-1])
    assert split_prompts(backwards, 0.1)[1] == held_out
    two = ToyTask(prompts=("w0 w1", "w2 w3"))
    for share in (0.01, 0.99):
        assert [len(part) for part in split_prompts(two, share)] == [1, 1]
    assert split_prompts(EchoTask(), 0.5) == (
        EchoTask().train_prompts(),
        [d.prompt for d in EchoTask().demonstration_split().held_out],
    )


def test_one_prompt_is_on_both_sides() -> None:
    assert split_prompts(ToyTask(), 0.1) == (("w0 w1",), ("w0 w1",))


def test_held_out_prompts_are_disjoint_in_the_files(tmp_path: Path, model: Pretrained) -> None:
    make(tmp_path, model, task=TWO_WORDS, reward=Length(target_tokens=1))
    train, held_out = ({p.prompt for p in pairs(tmp_path, n)} for n in ("train", "test"))
    assert not train & held_out
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "running"
