"""Rollouts of phases: with scores on a thread, and with batches sampled ahead of learning."""

import copy
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_exp.functional.logprobs import completion_logits, token_logprobs
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rl.collect import Scorer
from rlhf_exp.rl.phases import Phases
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.checkpoint import read_newest_checkpoint
from rlhf_exp.settings import settings
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.stages.protocol import StageResult
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.types import Completions, Rollout

from ..stages.test_resume import Failing, files, timeless
from .toy import RAGGED, context, experience_of, learn, parts, phase, ppo_with, rows, start

SYNC = ppo_with(
    batch_size=9, num_minibatches=3, total_phases=5, eval_samples=6, eval_every=9,
    reward_timeout_s=None,
)  # fmt: skip
AHEAD = ppo_with(
    batch_size=9, num_minibatches=3, total_phases=5, eval_samples=6, eval_every=9,
    async_reward=True,
)  # fmt: skip
# Without an end every batch takes as many forward passes of the policy as there are tokens.
SAMPLER = CachedSampler(gen_len=4)
OPTIMIZER = AdamWSettings(base_lr=2e-2, head_lr=2e-2)


@dataclass
class Seen:
    """What a reward noted at its calls."""

    threads: list[str] = field(default_factory=list)
    idents: list[int] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0


SEEN: dict[str, Seen] = {}


@settings
class Noting:
    """Counts low words, on a thread slowly, and notes under its name who asked for what."""

    name: str
    takes_s: float = 0.0

    def load(self, device: torch.device) -> RewardFunction:
        seen = SEEN[self.name] = Seen()

        def score(completions: Completions) -> Tensor:
            seen.at_once += 1
            seen.most_at_once = max(seen.most_at_once, seen.at_once)
            seen.threads.append(threading.current_thread().name)
            seen.idents.append(threading.get_ident())
            seen.texts.append(completions.full_texts)
            if threading.current_thread() is not threading.main_thread():
                time.sleep(self.takes_s)
            seen.at_once -= 1
            texts = [text.split() for text in completions.texts]
            return torch.tensor([float(sum(word < "w6" for word in words)) for words in texts])

        return score


def started(path: Path, ppo: PPO, **replaced: object) -> tuple[Setup, TrainState]:
    given = {"task": RAGGED, "sampler": SAMPLER, "reward": Failing(), "optimizer": OPTIMIZER}
    return start(ppo, path, **{**given, **replaced})


def phases(
    path: Path, ppo: PPO, another: list[bool], **replaced: object
) -> tuple[list[dict[str, float]], TrainState]:
    """The metrics of phases, times left out."""
    setup, state = started(path, ppo, **replaced)
    run = Phases(ppo, setup, state, Stopwatch())
    metrics = []
    for more in another:
        run.rollouts.total_phases = state.phase + 1 + more
        metrics.append(phase(ppo, setup, state, run))
    return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in metrics], state


def test_the_first_phase_and_every_prompt_are_those_without_it(tmp_path: Path) -> None:
    more = [True, True, True, False]
    sync, _ = phases(tmp_path, SYNC, more, reward=Noting(name="sync"))
    ahead, _ = phases(tmp_path, AHEAD, more, reward=Noting(name="ahead"))
    assert ahead[0] == sync[0]
    assert ahead[1] != sync[1]
    texts = [[[t[:2] for t in batch] for batch in SEEN[n].texts] for n in ("sync", "ahead")]
    assert texts[0] == texts[1]
    assert SEEN["ahead"].texts[0] == SEEN["sync"].texts[0]


def test_scores_come_from_the_thread(tmp_path: Path) -> None:
    phases(tmp_path, SYNC, [True, False], reward=Noting(name="sync"))
    phases(tmp_path, AHEAD, [True, False], reward=Noting(name="ahead"))
    main = threading.main_thread().name
    assert SEEN["sync"].threads == [main, main]
    assert len(SEEN["ahead"].threads) == 2
    assert main not in SEEN["ahead"].threads


@pytest.mark.parametrize(
    ("options", "on_main"),
    [
        ({}, False),
        ({"async_reward": True}, False),
        ({"async_reward": True, "reward_timeout_s": None}, False),
        ({"reward_timeout_s": None}, True),
    ],
    ids=str,
)
def test_phases_and_evaluations_ask_on_one_thread(
    options: dict[str, Any], on_main: bool, tmp_path: Path
) -> None:
    ppo = ppo_with(total_phases=2, batch_size=4, num_minibatches=1, eval_samples=4, **options)
    ppo.run(context(tmp_path), parts(reward=Noting(name="one")))
    assert len(SEEN["one"].idents) == 4
    assert set(SEEN["one"].idents) == {SEEN["one"].idents[0]}
    assert (SEEN["one"].idents[0] == threading.get_ident()) == on_main


@dataclass
class Clock:
    """How often the policy's trunk has run."""

    passes: int = 0


CLOCK = Clock()


@settings
class Waiting:
    """Waits, at its first call, for a forward pass of the next batch; its scores say whether one
    came."""

    def load(self, device: torch.device) -> RewardFunction:
        calls = iter(range(100))

        def score(completions: Completions) -> Tensor:
            deadline = time.monotonic() + (10 if next(calls) == 0 else 0)
            while CLOCK.passes <= SAMPLER.gen_len and time.monotonic() < deadline:
                time.sleep(0.002)
            came = CLOCK.passes > SAMPLER.gen_len
            return torch.full((len(completions.texts),), float(came))

        return score


def test_the_next_batch_is_sampled_while_the_reward_works(tmp_path: Path) -> None:
    CLOCK.passes = 0
    setup, state = started(tmp_path, AHEAD, reward=Waiting())
    setup.policy.language_model.base_model.register_forward_pre_hook(
        lambda module, args: setattr(CLOCK, "passes", CLOCK.passes + 1)
    )
    assert phase(AHEAD, setup, state)["objective/scores"] == 1


def collected(run: Phases, *, another: bool) -> Rollout:
    run.state.phase += 1
    run.rollouts.total_phases = run.state.phase + another
    return run.collect(run.state.phase)


@torch.no_grad()
def logprobs_of(policy: Any, rollout: Rollout) -> Tensor:
    completions = rollout.completions
    logits = policy(*completions.sequences)[0]
    return token_logprobs(completion_logits(logits, completions.prompt_len), completions.tokens)


def test_a_batch_ahead_is_the_earlier_policys_and_keeps_its_scores(tmp_path: Path) -> None:
    setup, state = started(tmp_path, AHEAD)
    run = Phases(AHEAD, setup, state, Stopwatch())
    first = copy.deepcopy(setup.policy)
    rollouts, since = [], []
    for more in (True, False, False):
        rollout = collected(run, another=more)
        expected = setup.score(rollout.completions)
        assert torch.equal(rollout.scores, expected)
        assert len(set(expected.tolist())) > 1
        rollouts.append(rollout)
        since.append(copy.deepcopy(setup.policy))
        experience = experience_of(AHEAD, rollout)
        list(learn(AHEAD, setup, state, experience))
    # The second batch comes from before the first update, the third is fresh again.
    for rollout, policy in zip(rollouts, (first, first, since[2]), strict=True):
        torch.testing.assert_close(logprobs_of(policy, rollout), rollout.logprobs)
    assert (logprobs_of(since[1], rollouts[1]) - rollouts[1].logprobs).abs().max() > 1e-3


def test_nothing_is_sampled_that_no_phase_asks_for(tmp_path: Path) -> None:
    _, sync = phases(tmp_path, SYNC, [False] * 3)
    for more in ([True, True, False], [False, True, False], [False] * 3):
        _, ahead = phases(tmp_path, AHEAD, more)
        assert torch.equal(ahead.sample_generator.get_state(), sync.sample_generator.get_state())
        drawn, expected = ahead.prompts.state_dict(), sync.prompts.state_dict()
        assert all(torch.equal(drawn[name], expected[name]) for name in expected)


def test_the_penalty_of_a_missing_end_is_charged_on_the_thread(tmp_path: Path) -> None:
    sampler = CachedSampler(gen_len=6, stop_at_eos=True, temperature=3.0)
    seen = []
    for options in ({}, {"async_reward": True}):
        ppo = ppo_with(batch_size=9, num_minibatches=3, missing_eos_penalty=3.0, **options)
        metrics, _ = phases(tmp_path, ppo, [True], sampler=sampler)
        seen.append(metrics[0]["objective/scores"])
    without, _ = phases(tmp_path, SYNC, [True], sampler=sampler)
    assert seen[0] == seen[1] < without[0]["objective/scores"] - 0.5


def test_scores_beside_the_reference_change_nothing(tmp_path: Path) -> None:
    seen = []
    for name, overlap in (("plain", False), ("overlap", True)):
        setup, state = started(tmp_path, SYNC, reward=Noting(name=name))
        run = Phases(SYNC, setup, state, Stopwatch())
        if overlap:
            run.scorer = Scorer(setup.score, SYNC.guards, on_thread=True, penalty=None)
        seen.append([collected(run, another=True) for _ in range(2)])
    assert "MainThread" not in SEEN["overlap"].threads
    assert SEEN["overlap"].texts == SEEN["plain"].texts
    for one, other in zip(*seen, strict=True):
        for name in ("scores", "logprobs", "ref_logprobs", "kl", "values"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def run(path: Path, ppo: PPO, *, resume: bool = False, **replaced: object) -> StageResult:
    given = {"task": RAGGED, "sampler": SAMPLER, "reward": Failing(), "optimizer": OPTIMIZER}
    return ppo.run(context(path, resume=resume), parts(**{**given, **replaced}))


def every(count: int | None, *, ahead: bool = True) -> PPO:
    return ppo_with(
        batch_size=9, num_minibatches=3, total_phases=5, eval_samples=6, eval_every=2,
        checkpoint_every=count, async_reward=ahead,
    )  # fmt: skip


def test_a_run_scores_each_phase_once_and_one_call_at_a_time(tmp_path: Path) -> None:
    # Tokenizers of rewards are not made for two calls at once, and an evaluation asks too.
    run(tmp_path, every(None), reward=Noting(name="run", takes_s=0.3))
    assert len(SEEN["run"].texts) == 5 + 4  # evaluations at 0, 2, 4 and 5
    assert SEEN["run"].most_at_once == 1


def test_a_reward_that_raises_on_the_thread_ends_the_run(tmp_path: Path) -> None:
    # The calls: an evaluation, then the phases, each one ahead.
    reward = Failing(at=4, interrupted=False)
    with pytest.raises(RewardError, match=r"^phase 3: the judge is gone$"):
        run(tmp_path, every(None), reward=reward)
    assert [row["phase"] for row in rows(tmp_path)][:2] == [0, 1]
    assert 3 not in [row["phase"] for row in rows(tmp_path)]


def test_checkpoints_change_no_batch(tmp_path: Path) -> None:
    run(tmp_path / "every", every(1))
    run(tmp_path / "none", every(None))
    run(tmp_path / "sync", every(1, ahead=False))
    assert timeless(tmp_path / "every") == timeless(tmp_path / "none")
    assert files(tmp_path / "every") == files(tmp_path / "none")
    assert timeless(tmp_path / "every") != timeless(tmp_path / "sync")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("at", "phase"),
    [
        (4, None),
        (7, 2),
        *(pytest.param(*given, marks=pytest.mark.soak) for given in ((6, 2), (9, 4))),
    ],
)
def test_a_run_goes_on_bit_by_bit_across_batches_ahead(
    at: int, phase: int | None, tmp_path: Path
) -> None:
    # The calls: an evaluation, a phase, two ahead, an evaluation, two ahead, an evaluation, one
    # ahead ...; a checkpoint waits for the scores of the batch ahead.
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, every(2))
    with pytest.raises(KeyboardInterrupt):
        run(cut, every(2), reward=Failing(at=at))
    newest = read_newest_checkpoint(cut)
    assert (newest and newest.numbers["phase"]) == phase
    if newest is not None:
        assert len(newest.numbers["state"]["ahead"]["rows"]) == 9
    run(cut, every(2), resume=True)
    assert timeless(cut) == timeless(whole)
    assert files(cut) == files(whole)
