"""What a learning step needs beside weights and gradients does not grow with the vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.kernels import vocab_head
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.tasks.tokenizers import word_tokenizer

from .fixed import fixed_completions, fixed_experience
from .toy import ToyTask, learn, ppo_with, start, textbook_pass

GEN_LEN = 24


@dataclass(frozen=True)
class ManyWords(ToyTask):
    """Prompts in a vocabulary of this many words and four special tokens."""

    count: int = 0

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        return word_tokenizer([f"w{i}" for i in range(self.count)])


def peak(step: Callable[[], object]) -> int:
    """Bytes that tensors took at most while it ran, beyond what they had taken before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    taken = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            taken += event.nbytes()
            highest = max(highest, taken)
    return highest


def of_a_step(path: Path, *, vocab: int, rows: int, dtype: str, tied: bool) -> tuple[int, int]:
    """The peak of a step of learning, gradients and moments being there, and that of the
    textbook's pass."""
    ppo = ppo_with(batch_size=rows, num_minibatches=1, batches_per_learning_phase=1, dtype=dtype)
    model = Scratch(
        num_layers=1, d_model=16, num_heads=2, context_len=32, tie_embeddings=tied,
    )  # fmt: skip
    setup, state = start(ppo, path, task=ManyWords(count=vocab), model=model)
    ppo.compute.prepare(setup)
    completions = fixed_completions(setup, lengths=[GEN_LEN] * rows, width=GEN_LEN)
    experience = fixed_experience(ppo, setup, completions)
    policy, reference = setup.policy, setup.reference

    def step() -> None:
        list(learn(ppo, setup, state, experience))

    def by_the_book() -> None:
        textbook_pass(policy, reference, experience.rollout, temperature=1.0).kl.sum().backward()

    with policy.working():
        step()
        return peak(step), peak(by_the_book) if vocab < 10_000 else 0


@pytest.mark.parametrize(
    ("dtype", "tied"),
    [pytest.param("fp32", True, marks=pytest.mark.soak), ("fp32", False), ("bf16", True)],
)
def test_a_step_of_learning_takes_no_more_for_a_larger_vocabulary(
    dtype: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocab_head, "KEPT", 0)  # as with more rows than fit into it
    small, book = of_a_step(tmp_path, vocab=5_000, rows=16, dtype=dtype, tied=tied)
    large, _ = of_a_step(tmp_path, vocab=50_000, rows=16, dtype=dtype, tied=tied)
    logits = 4 * 16 * GEN_LEN * 5_000
    assert book > 3 * logits  # policy's, reference's and what keeps them: this sees them
    # A matrix of the larger vocabulary alone is 3.2 MB.
    assert small <= large < small + 2**20
    assert large < 4 * 16 * GEN_LEN * 50_000 / 5


def test_it_grows_with_the_rows(tmp_path: Path) -> None:
    one, two = (
        of_a_step(tmp_path, vocab=12_000, rows=rows, dtype="fp32", tied=True)[0]
        for rows in (16, 32)
    )
    assert 1.5 * one < two < 2.1 * one
