"""Exact answers: every token and EOS, no more and no less."""

import pytest
import torch

from rlhf_exp.rl import exact_answers
from rlhf_exp.rl.exact_answers import exact_match, exact_matches, judge_answers
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.tasks.arithmetic import TEMPLATES, Arithmetic
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.types import Completions, PromptBatch

from .toy import EchoTask, echo_policy

SAMPLER = CachedSampler(gen_len=4, stop_at_eos=True)


def prompt_batch(texts: list[str]) -> PromptBatch:
    return PromptBatch(
        tokens=torch.ones(len(texts), 1, dtype=torch.long),
        mask=torch.ones(len(texts), 1, dtype=torch.bool),
        rows=tuple({"prompt": text} for text in texts),
    )


def written(
    rows: list[list[str]], *, prompts: list[str] | None = None, fill: str = "<PAD>"
) -> Completions:
    """Completions of these tokens of task=arithmetic; what is not real is filled up."""
    tokenizer = Arithmetic().build_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(row) for row in rows]
    width = max(map(len, ids)) + 1
    padding = tokenizer.convert_tokens_to_ids(fill)
    tokens = torch.tensor([[*row, *[padding] * (width - len(row))] for row in ids])
    mask = torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]
    texts = tuple(tokenizer.decode(row, skip_special_tokens=True) for row in ids)
    prompts = [""] * len(rows) if prompts is None else prompts
    return Completions(prompts=prompt_batch(prompts), tokens=tokens, mask=mask, texts=texts)


@pytest.mark.parametrize(
    ("tokens", "exact"),
    [
        ("3 5 7 <EOS>", True),
        ("3 5 7", False),
        ("3 5 7 9 <EOS>", False),
        ("3 5 7 9", False),
        ("3 5 <EOS>", False),
        ("3 5 8 <EOS>", False),
        ("5 3 7 <EOS>", False),
        ("3 5 7 <PAD>", False),
        ("3 <PAD> 5 7 <EOS>", False),
        ("<PAD> 3 5 7 <EOS>", False),
        ("3 5 7 <PAD> <EOS>", False),
        ("3 5 <SEP> 7 <EOS>", False),
        ("3 5 7 <SEP> <EOS>", False),
        ("3 5 7 <SEP>", False),
        ("<EOS>", False),
        ("3 5 7 <EOS> <EOS>", False),
    ],
)
@pytest.mark.parametrize("fill", ["<PAD>", "<EOS>", "9"])
def test_a_match_is_every_token_and_eos(tokens: str, exact: bool, fill: str) -> None:
    completions = written([tokens.split()], fill=fill)
    [match] = exact_matches(completions, [" 3 5 7"], Arithmetic().build_tokenizer()).tolist()
    assert match is exact


def test_each_row_is_compared_with_its_own_answer() -> None:
    completions = written([["1", "<EOS>"], ["1", "2", "<EOS>"], ["1", "<EOS>"]])
    matches = exact_matches(completions, [" 1", " 1 2", " 1 2"], Arithmetic().build_tokenizer())
    assert matches.tolist() == [True, True, False]


def test_completions_are_judged_by_their_own_prompts() -> None:
    prompts = [
        TEMPLATES[0].format(terms=5, start=0, difference=1),
        TEMPLATES[1].format(terms=6, start=90, difference=5),
    ]
    rows = [["0", "1", "2", "3", "4", "<EOS>"], ["90", "95", "99", "<EOS>"]]
    tokenizer = Arithmetic().build_tokenizer()
    judged = judge_answers(Arithmetic(), tokenizer, written(rows, prompts=prompts))
    assert judged.exact.tolist() == [True, False]
    # 90 95 100 beside 90 95 99 is a distance of 1.
    assert judged.true_rewards.tolist() == pytest.approx([7.0, 1 + 6 / 1.1])
    swapped = judge_answers(Arithmetic(), tokenizer, written(rows, prompts=prompts[::-1]))
    assert swapped.exact.tolist() == [False, False]
    assert max(swapped.true_rewards.tolist()) < 4


def echo_prompts() -> PromptBatch:
    return encode_prompts(
        echo_policy().tokenizer, EchoTask().train_prompts(), prepend_bos=True, device="cpu"
    )


def decoded_greedily(prompt: str, length: int) -> list[int]:
    """The most probable tokens by a loop without a cache, through the first EOS."""
    policy = echo_policy()
    ids = [1, *policy.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    given: list[int] = []
    while len(given) < length and given[-1:] != [policy.tokenizer.eos_token_id]:
        with torch.no_grad():
            logits = policy.language_model.eval()(input_ids=torch.tensor([ids + given])).logits
        given.append(int(logits[0, -1].argmax()))
    return given


@pytest.mark.parametrize("rows", [7, 128])
def test_the_greedy_rate_is_that_of_a_loop(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_answers, "ROWS", rows)
    task, tokenizer = EchoTask(), echo_policy().tokenizer
    right = 0
    for prompt in task.train_prompts():
        wanted = tokenizer(task.answer(prompt), add_special_tokens=False)["input_ids"]
        right += decoded_greedily(prompt, 4) == [*wanted, 2]
    rate = exact_match(echo_policy(), task, echo_prompts(), SAMPLER.greedy, torch.Generator())
    assert rate == pytest.approx(right / 96)
    assert 10 < right < 86


def test_sampled_answers_are_right_less_often_than_greedy_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    args = echo_policy(), EchoTask(), echo_prompts()
    sampled = [exact_match(*args, SAMPLER, generator) for _ in range(4)]
    assert max(sampled) < exact_match(*args, SAMPLER.greedy, generator)
    assert len(set(sampled)) > 1


@pytest.mark.parametrize("kind", [CachedSampler, BridgeSampler])
def test_greedy_changes_nothing_but_the_choice(kind: type) -> None:
    sampler = kind(gen_len=9, temperature=0.5, stop_at_eos=True)
    assert sampler.greedy == kind(gen_len=9, temperature=0.5, top_k=1, stop_at_eos=True)
