"""KL is found where a model was changed by hand, and nowhere else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.functional.logprobs import kl_divergence
from rlhf_exp.inside.kl import anatomy, by_token, compare_on, draw, measure
from rlhf_exp.inside.loading import Pair, open_run
from rlhf_exp.inside.subject import NEUTRAL_FILE, Subject
from rlhf_exp.inside.token_classes import token_classes
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.tasks.tokenizers import byte_pair_tokenizer
from rlhf_exp.types import Completions, Layout
from tests.builders import cut, ragged_tokens, tiny_policy
from tests.inside.tiny_runs import tiny_run

PROMPT_LEN = 3
ALTERNATING = torch.tensor([1.0, -1.0]).repeat(8)


def changed(policy: TransformerWithValueHead, name: str, row: int, by: torch.Tensor) -> Pair:
    """The policy, and one of whose parameter a row was moved."""
    tuned = copy.deepcopy(policy)
    with torch.no_grad():
        tuned.language_model.get_parameter(name)[row].add_(by)
    return Pair(base=policy, tuned=tuned)


def texts(batch: int = 12) -> Completions:
    """Completions of 6 tokens after 3, in some of the rows fewer."""
    tokens, _ = ragged_tokens(batch, PROMPT_LEN + 6)
    completions = cut(tokens, torch.ones_like(tokens, dtype=torch.bool), PROMPT_LEN)
    lengths = torch.tensor([6, 4, 5, 6, 6, 3, 6, 5, 6, 4, 6, 6][:batch])
    mask = torch.arange(6) < lengths[:, None]
    return Completions(
        prompts=completions.prompts, tokens=completions.tokens * mask, mask=mask,
        texts=completions.texts,
    )  # fmt: skip


def anatomy_of(pair: Pair) -> dict[str, Any]:
    classes = token_classes(pair.base.tokenizer, pair.base.head.weight.shape[0])
    return anatomy(compare_on(pair, texts()), classes)


def means(rows: list[dict[str, Any]], name: str = "kl") -> list[float]:
    return [row[name]["mean"] for row in rows]


def test_equal_models_differ_nowhere() -> None:
    policy = tiny_policy()
    found = anatomy_of(Pair(base=policy, tuned=copy.deepcopy(policy)))
    assert means(found["by_position"]) == means(found["by_position"], "reverse_kl") == [0] * 6
    assert found["whole"]["entropy"] == found["whole"]["base_entropy"]
    assert found["whole"]["surprise"] == found["whole"]["base_surprise"]
    assert found["kl_of_first_token_share"] is None


# Completion token t is predicted at position PROMPT_LEN - 1 + t.
@pytest.mark.parametrize("token", [0, 2, 5])
def test_a_changed_position_is_found(token: int) -> None:
    pair = changed(tiny_policy(), "transformer.wpe.weight", PROMPT_LEN - 1 + token, 8 * ALTERNATING)
    rows = anatomy_of(pair)["by_position"]
    for name in ("kl", "reverse_kl"):
        found = means(rows, name)
        assert found[:token] == [0] * token  # no position sees a later one
        assert found[token] == max(found) > 0.5
    assert rows[token]["kl"]["low"] > 0.2
    # As many tokens as there are rows that are long enough.
    assert [row["tokens"] for row in rows] == [12, 12, 12, 11, 9, 7]


def test_means_and_shares_are_those_of_plain_passes() -> None:
    pair = changed(
        tiny_policy("llama"), "model.layers.1.input_layernorm.weight", 3, torch.tensor(2.0)
    )
    completions = texts()
    logits, base_logits = (policy(*completions.sequences)[0][:, 2:-1] for policy in reversed(pair))
    kl = kl_divergence(logits, base_logits) * completions.mask
    found = anatomy_of(pair)
    assert found["tokens"] == int(completions.mask.sum())
    expected = kl.sum().item() / found["tokens"]
    assert found["whole"]["kl"]["mean"] == pytest.approx(expected, rel=1e-4)
    share = (kl[:, 0].sum() / kl.sum()).item()
    assert found["kl_of_first_token_share"] == pytest.approx(share, rel=1e-4)
    assert sum(row["kl_share"] for row in found["by_position"]) == pytest.approx(1, rel=1e-5)
    assert sum(row["kl_share"] for row in found["by_class"]) == pytest.approx(1, rel=1e-5)
    for is_word, names in (
        (True, {"function word", "content word"}),
        (False, {"punctuation", "special"}),
    ):
        rows = [row for row in found["by_class"] if row["class"] in names]
        [beginning] = [r for r in found["by_word_beginning"] if r["begins_word"] == is_word]
        assert beginning["tokens"] == sum(row["tokens"] for row in rows) > 0


def test_a_token_that_was_raised_is_found() -> None:
    base = tiny_policy("gpt_neox")  # whose output embedding is its own
    tuned = copy.deepcopy(base)
    completions = texts()
    states = base.completion_states(completions, Layout.of(completions, whole=True)).flatten(0, 1)
    with torch.no_grad():
        tuned.language_model.lm_head.weight[7] += 0.2 * states.mean(dim=0)
        tuned.language_model.lm_head.weight[9] -= 0.2 * states.mean(dim=0)
    compared = compare_on(Pair(base=base, tuned=tuned), completions)
    found = by_token(compared, token_classes(base.tokenizer, 16), base.tokenizer)
    assert found["rising"][0]["token"] == 7
    assert found["rising"][0]["text"] == "three"
    row = found["rising"][0]
    assert row["rise"]["mean"] == pytest.approx(
        row["probability"] - row["base_probability"], abs=1e-6
    )
    assert row["rise"]["mean"] > 0.05
    assert row["kl_term"] > 0
    terms = [r["kl_term"] for rows in found.values() for r in rows]
    assert len(terms) == 16  # the whole vocabulary
    assert sum(terms) == pytest.approx(
        compared.at_tokens["kl"].sum().item() / compared.mask.sum().item(), rel=1e-4
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("model=tiny", "model.num_layers=1", "model.d_model=16", "task=reviews")
    return tiny_run(tmp_path_factory.mktemp("runs") / "run", *words, saved=False)


def test_samples_are_fresh_and_the_same_each_time(run: Path) -> None:
    subject = Subject(run=open_run(run), num_samples=40)
    first = subject.own_samples.completions
    again = Subject(run=open_run(run), num_samples=40).own_samples.completions
    assert first.texts == again.texts
    assert len(first.texts) == 40
    assert first.tokens.shape == (40, 6)
    logged = (run / "samples.jsonl").read_text()
    assert sum(repr(text)[1:-1] in logged for text in first.texts) < 10


def test_a_vocabulary_of_few_words_gets_texts_of_its_task(run: Path) -> None:
    record = measure(Subject(run=open_run(run), num_samples=8))
    assert record["missing"] == {}
    assert record["neutral_texts"]["source"] == "held-out texts of the task"
    assert record["neutral_texts"]["samples"] == 8


def test_a_run_without_words_for_neutral_texts_says_so(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    record = measure(Subject(run=open_run(run), phase=2, num_samples=4))
    assert record["neutral_texts"] is None
    assert "does not know the words" in record["missing"]["neutral_texts"]
    assert record["own_samples"]["samples"] == 4
    [path] = draw(record, tmp_path / "out")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_neutral_texts_are_many_and_short() -> None:
    lines = NEUTRAL_FILE.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 40
    assert all(8 <= len(line.split()) <= 24 for line in lines)


def test_a_vocabulary_of_english_reads_the_neutral_texts(tmp_path: Path) -> None:
    lines = NEUTRAL_FILE.read_text(encoding="utf-8").splitlines()
    tokenizer = byte_pair_tokenizer(lines, vocab_size=500)
    model = Scratch(num_layers=1, d_model=16, num_heads=2, context_len=24)
    network, _ = model.language_model(lambda: tokenizer, seed=0)
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "base")
    words = ("task.prefix=[The river,A lamp]", f"model.base_model={tmp_path / 'base'}")
    run = tiny_run(tmp_path / "run", *words, "sampler.gen_len=8")
    subject = Subject(run=open_run(run), num_samples=16)
    record = measure(subject)
    neutral = record["neutral_texts"]
    assert (neutral["source"], neutral["samples"]) == ("neutral.txt", 40)
    assert len(neutral["by_position"]) == 23  # the context without BOS
    present = {row["class"] for row in neutral["by_class"] if row["tokens"]}
    assert {"function word", "content word", "word part", "punctuation"} <= present
    completions = subject.neutral_texts.completions
    assert all(line.startswith(text) for line, text in zip(lines, completions.texts, strict=True))
    assert completions.prompts.tokens.tolist() == [[tokenizer.bos_token_id]] * 40
