"""What samples and what scores: loaded as asked, and refused where it does not fit."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.rl.setup import Setup, load_sampled_policy, load_setup, without
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.settings import ConfigError, settings
from rlhf_exp.tasks.protocol import PromptRow
from rlhf_exp.types import Completions

from ..builders import prompts
from .toy import RAGGED, EchoTask, ToyTask, context, parts


def loaded(path: Path, **replaced: object) -> Setup:
    p = parts(**replaced)
    return load_setup(context(path), p.task, p.model, p.reward, p.sampler, p.finetune)


def test_prompts_are_the_tasks_and_answers_are_where_it_knows_them(tmp_path: Path) -> None:
    setup = loaded(tmp_path, task=EchoTask())
    assert setup.answers == EchoTask()
    assert setup.train_prompts.texts == EchoTask().train_prompts()
    assert setup.eval_prompts.texts == EchoTask().eval_prompts()
    assert set(setup.train_prompts.tokens[:, 0].tolist()) == {1}
    without = loaded(tmp_path, task=ToyTask(prepend_bos=False))
    assert without.answers is None
    assert without.train_prompts.tokens.tolist() == [[4, 5]]


@dataclass(frozen=True)
class FirstWords(ToyTask):
    """Prompts cut to BOS and their first word."""

    evaluated: tuple[str, ...] = ()

    def eval_prompts(self) -> tuple[str, ...]:
        return self.evaluated

    def shape_prompt(self, row: PromptRow, ids: Sequence[int]) -> Sequence[int] | None:
        return ids[:2]


def test_prompts_that_are_one_when_cut_are_on_one_side(tmp_path: Path) -> None:
    texts = ("w0 w1", "w2 w3")
    evaluated = ("w4 w5", "w2 w7", "w6", "w0 w1 w2")
    setup = loaded(tmp_path, task=FirstWords(prompts=texts, evaluated=evaluated))
    assert setup.train_prompts.texts == ("w0", "w2")
    assert setup.eval_prompts.texts == ("w4", "w6")
    # All of them, if nothing else would be left.
    setup = loaded(tmp_path, task=FirstWords(prompts=texts, evaluated=evaluated[1:2]))
    assert setup.eval_prompts.texts == ("w2",)
    # Prompts that nobody cuts are as the task gives them.
    assert loaded(tmp_path).train_prompts.texts == loaded(tmp_path).eval_prompts.texts


def test_prompts_to_train_on_are_not_said_to_be_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rlhf_exp.rl.setup"):
        loaded(tmp_path, task=FirstWords(prompts=("w0 w1", "w2"), evaluated=("w4", "w6")))
        loaded(tmp_path, task=ToyTask())
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "2 prompts to train on, 2 held out",
        "1 prompts to train on, 0 held out",
    ]


def test_prompts_are_compared_without_their_padding(tmp_path: Path) -> None:
    policy = loaded(tmp_path).policy
    wide, narrow = prompts(policy, ["w1", "w2 w3 w4"]), prompts(policy, ["w1", "w3"])
    assert without(wide, narrow).texts == ("w2 w3 w4",)
    assert without(narrow, wide).texts == ("w3",)
    assert without(narrow, wide).tokens.tolist() == [[1, 7]]


def test_the_reference_is_a_frozen_copy(tmp_path: Path) -> None:
    setup = loaded(tmp_path)
    own = dict(setup.policy.language_model.named_parameters())
    for name, parameter in setup.reference.language_model.named_parameters():
        assert torch.equal(parameter, own[name])
        assert not parameter.requires_grad
        assert parameter.data_ptr() != own[name].data_ptr()


def test_the_model_is_drawn_from_the_runs_seed(tmp_path: Path) -> None:
    p = parts()
    first, again, other = (
        load_sampled_policy(context(tmp_path, seed), p.task, p.model, p.sampler)
        for seed in (1, 1, 2)
    )
    for a, b, c in zip(*(m.parameters() for m in (first, again, other)), strict=True):
        assert torch.equal(a, b)
        assert a.ndim < 2 or not torch.equal(a, c)


@settings
class Reads:
    """A reward that reads tokens, and refuses a policy whose prompts begin as it says."""

    refused: bool

    def check_policy(
        self, tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool, num_tokens: int
    ) -> None:
        assert num_tokens > 1
        if prepend_bos == self.refused:
            raise ConfigError(f"reward: BOS {prepend_bos}, {tokenizer.eos_token}")

    def load(self, device: torch.device) -> RewardFunction:
        def score(completions: Completions) -> torch.Tensor:
            return completions.tokens[:, 0].float()

        return score


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_a_reward_that_reads_tokens_is_asked_whether_it_can(
    tmp_path: Path, prepend_bos: bool
) -> None:
    task = ToyTask(prepend_bos=prepend_bos)
    with pytest.raises(ConfigError, match=f"reward: BOS {prepend_bos}, <eos>"):
        loaded(tmp_path, task=task, reward=Reads(refused=prepend_bos))
    setup = loaded(tmp_path, task=task, reward=Reads(refused=not prepend_bos))
    generation = setup.sampler(setup.policy, setup.train_prompts, torch.Generator())
    first = generation.completions.tokens[:, 0]
    assert setup.score(generation.completions).tolist() == first.tolist()


@pytest.mark.parametrize("gen_len", [11, 12])
def test_the_longest_prompt_and_its_completion_fill_the_context_at_most(
    tmp_path: Path, gen_len: int
) -> None:
    sampler = CachedSampler(gen_len=gen_len)
    if gen_len == 11:  # BOS and four words before
        assert loaded(tmp_path, task=RAGGED, sampler=sampler).train_prompts.tokens.shape[1] == 5
        return
    message = (
        r"a prompt of 5 tokens and sampler.gen_len=12 exceed the model's context of 16 tokens;"
        r" set sampler.gen_len to at most 11 or"
    )
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, task=RAGGED, sampler=sampler)


def test_a_long_prompt_among_those_of_the_evaluation_is_refused_too(tmp_path: Path) -> None:
    class LongEvaluation(ToyTask):
        def eval_prompts(self) -> tuple[str, ...]:
            return ("w0 " * 20,)

    with pytest.raises(ConfigError, match=r"a prompt of 21 tokens .* to at most 0 or"):
        loaded(tmp_path, task=LongEvaluation())


def test_a_model_from_nothing_needs_the_tasks_tokenizer(tmp_path: Path) -> None:
    class PromptsAlone:
        prepend_bos = True
        fingerprint = staticmethod(str)
        train_prompts = eval_prompts = staticmethod(lambda: ("w0",))

    with pytest.raises(ConfigError, match="a model from scratch needs a task with texts"):
        loaded(tmp_path, task=PromptsAlone(), model=Scratch())
