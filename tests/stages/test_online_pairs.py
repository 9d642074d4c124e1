"""Pairs that the policy samples: ordered by the reward, its own, and the same after a resume."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.rewards.length import Length
from rlhf_exp.rewards.protocol import Reward, RewardFunction
from rlhf_exp.rl.setup import Setup, load_setup
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import settings
from rlhf_exp.stages.online_pairs import Answer, OnlinePairs, ordered_pair
from rlhf_exp.types import Completions

from ..builders import assert_near
from ..rl.toy import RAGGED, LowWords, ToyPairs, context, parts, saved_model
from ..states import through_a_file


def setup_of(path: Path, reward: Reward | None = None) -> Setup:
    taken = parts(reward=reward or LowWords(), task=RAGGED, model=saved_model(path))
    sampler = CachedSampler(gen_len=4, stop_at_eos=True, temperature=3.0)  # some answers end
    return load_setup(
        context(path), taken.task, taken.model, taken.reward, sampler, taken.finetune,
        value_head=False,
    )  # fmt: skip


def online(
    setup: Setup, log: list[tuple[int, Mapping[str, float]]] | None = None, **options: Any
) -> OnlinePairs:
    given = {"batch_size": 5, "num_batches": 2, "dtype": "fp32", "seed": 1, **options}
    rows = [] if log is None else log
    return OnlinePairs(setup, setup.train_prompts, log=lambda *row: rows.append(row), **given)


def test_the_better_answer_is_chosen_and_ties_are_dropped() -> None:
    good, bad = Answer([5, 2], " a", 1.0, True), Answer([6], " b", -1.0, False)
    for answers in ((good, bad), (bad, good)):
        made = ordered_pair([1, 4], "p", *answers)
        assert made is not None
        assert tuple(made.pair) == ("p", " a", " b", 1.0, -1.0, True, False)
        assert (made.prompt, made.chosen, made.rejected) == ([1, 4], [5, 2], [6])
    assert ordered_pair([1], "p", good, bad._replace(reward=1.0)) is None
    assert ordered_pair([1], "p", good, bad._replace(tokens=[5, 2])) is None


def test_pairs_are_the_policys_answers_to_the_prompts(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    tokenizer = setup.policy.tokenizer
    data, index = next(online(setup, batch_size=20))
    assert index == [*range(20)]
    assert len(data) == 40
    for made in data.pairs:
        assert made.pair.prompt in RAGGED.prompts
        assert made.prompt == [1, *tokenizer(made.pair.prompt, add_special_tokens=False).input_ids]
        for name in ("chosen", "rejected"):
            tokens, text = getattr(made, name), getattr(made.pair, name)
            assert tokenizer.decode(tokens, skip_special_tokens=True) == text.strip()
            assert (tokens[-1] == tokenizer.eos_token_id) is getattr(made.pair, f"{name}_ended")
            assert getattr(made.pair, f"{name}_reward") == ToyPairs.reward(text)
        assert made.pair.chosen_reward > made.pair.rejected_reward
    assert {made.pair.chosen_ended for made in data.pairs} == {True, False}
    # At the start policy and reference are one model.
    for own, reference in zip(
        data.all_logprobs(setup.policy), data.reference(range(40)), strict=True
    ):
        assert_near(own, reference)


def test_new_pairs_are_sampled_when_all_are_used(tmp_path: Path) -> None:
    log: list[tuple[int, Mapping[str, float]]] = []
    setup = setup_of(tmp_path)
    batches = online(setup, log, num_batches=3)
    drawn = [next(batches) for _ in range(7)]
    assert [index[0] for _, index in drawn] == [0, 5, 10, 0, 5, 10, 0]
    assert [drawn[i][0] is drawn[i + 1][0] for i in range(6)] == [True, True, False] * 2
    assert [phase for phase, _ in log] == [0, 3, 6]
    for (_, metrics), data in zip(log, [drawn[i][0] for i in (0, 3, 6)], strict=True):
        assert 0 < metrics["pairs/tie_fraction"] < 1
        if len(data) == 15:  # else some were left over
            assert metrics["pairs/chosen_reward"] > metrics["pairs/rejected_reward"]
    texts = [[made.pair.chosen for made in drawn[i][0].pairs] for i in (0, 3, 6)]
    assert texts[0] != texts[1] != texts[2]


def test_metrics_are_of_all_answers_that_were_sampled(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    reward = setup.score
    assert reward is not None
    answers: list[tuple[float, list[int]]] = []

    def score(completions: Completions) -> torch.Tensor:
        rewards = reward(completions)
        for row, mask, r in zip(completions.tokens, completions.mask, rewards, strict=True):
            answers.append((r.item(), row[mask].tolist()))
        return rewards

    log: list[tuple[int, Mapping[str, float]]] = []
    next(online(replace(setup, score=score), log, num_batches=3))
    pairs = [*zip(answers[::2], answers[1::2], strict=True)]
    usable = [(a[0], b[0]) for a, b in pairs if a[0] != b[0] and a[1] != b[1]]
    assert len(pairs) > len(usable) > 15  # some ties, and some pairs left over
    [(phase, metrics)] = log
    assert phase == 0
    assert metrics == pytest.approx({
        "pairs/tie_fraction": 1 - len(usable) / len(pairs),
        "pairs/chosen_reward": sum(map(max, usable)) / len(usable),
        "pairs/rejected_reward": sum(map(min, usable)) / len(usable),
    })  # fmt: skip


def test_answers_are_sampled_in_the_stages_dtype(tmp_path: Path) -> None:
    setup, cast = setup_of(tmp_path), []
    setup.policy.language_model.base_model.register_forward_pre_hook(
        lambda *_: cast.append(torch.is_autocast_enabled("cpu"))
    )
    for dtype in ("fp32", "bf16"):
        next(online(setup, dtype=dtype))
        assert {*cast} == {dtype == "bf16"}
        cast.clear()


def test_each_seed_has_its_own_answers(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    one, again, two = (online(setup, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(one["sampling"], again["sampling"])
    assert not torch.equal(one["sampling"], two["sampling"])


def test_pairs_follow_the_policy(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    batches = online(setup, num_batches=1)
    next(batches)
    eos = setup.policy.tokenizer.eos_token_id
    with torch.no_grad():  # nothing but one word and EOS has any probability
        head = setup.policy.language_model.get_output_embeddings()
        head.weight[:] = 0
        setup.policy.language_model.get_input_embeddings().weight[:] = 0
        setup.policy.language_model.transformer.ln_f.bias[:] = 1
        head.weight[eos] = head.weight[4] = 5
    data, _ = next(batches)
    assert {token for made in data.pairs for token in made.chosen + made.rejected} == {eos, 4}
    own, reference = data.all_logprobs(setup.policy), data.reference(range(5))
    assert (own.chosen - reference.chosen).abs().max() > 0.1


def test_it_goes_on_from_its_state(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    whole, cut = online(setup), online(setup)
    expected = [next(whole) for _ in range(6)]
    for _ in range(3):
        next(cut)
    state = through_a_file(cut.state_dict(), tmp_path)
    other = online(setup, seed=7)
    other.load_state_dict(state)
    for data, index in expected[3:]:
        again, place = next(other)
        assert place == index
        assert [made.pair for made in again.pairs] == [made.pair for made in data.pairs]
        for one, two in zip(again.reference(place), data.reference(index), strict=True):
            assert torch.equal(one, two)


@settings
class Indifferent:
    """The same reward for every answer."""

    def load(self, device: torch.device) -> RewardFunction:
        def score(completions: Completions) -> torch.Tensor:
            return torch.ones(len(completions.texts))

        return score


def test_a_reward_that_orders_nothing_ends_the_run(tmp_path: Path) -> None:
    batches = online(setup_of(tmp_path, Indifferent()), batch_size=1, num_batches=1)
    with pytest.raises(TrainingError, match="update 1: of 100 prompts only 0 gave two answers of"):
        next(batches)
    next(online(setup_of(tmp_path, Length(target_tokens=2))))
