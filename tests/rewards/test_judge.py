"""Judges: their scores are those of a plain pass over the whole question, however much of it is
run once, and a judge that cannot answer is refused."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.loading import load_policy
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rewards import judge_check
from rlhf_exp.rewards.judge import AnswerLogits, Judge
from rlhf_exp.rewards.question import Example, Question
from rlhf_exp.rewards.weighted_sum import Term, WeightedSum
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Completions, PromptBatch
from tests.builders import completions, stretch, tiny_policy
from tests.gguf_files import TEXTS, write_gguf

CPU = torch.device("cpu")
BEFORE = ["this movie", "this film was", "too long", "bad"]
AFTER = [" was really good", "", " and far too long", " movie bad film and long"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FEW_SHOT: dict[str, Any] = {
    "template": "film: {text}\n:",
    "examples": (Example(text="far", answer=" bad"), Example(text="long", answer=" good")),
    "answers": [" bad", " good"],
}
# As the template and the examples say, for the text T.
PREFIX = "film: far\n: bad\n\nfilm: long\n: good\n\n"


def save_judge(path: Path, architecture: str = "llama", *, chat: str | None = None) -> str:
    """A tiny model with large random weights and a byte-level tokenizer."""
    path.mkdir()
    write_gguf(path / "model.gguf", "qwen2" if architecture == "qwen2" else "llama")
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file="model.gguf")
    tokenizer.chat_template = chat
    if architecture == "gpt2":
        model = tiny_policy("gpt2").language_model
        model.resize_token_embeddings(len(tokenizer))
        model.config.max_position_embeddings = model.config.n_positions = 128
        model = type(model)(model.config)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(path, gguf_file="model.gguf")
        config = loaded.config
        del config.quantization_config
        config.max_position_embeddings = 128
        model = type(loaded)(config)
    stretch(model, seed=0)
    (path / "model.gguf").unlink()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@torch.no_grad()
def answer_logits(path: str, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
    """The answers' logits after each question, run by itself, as plain transformers computes
    them."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [tokenizer(answer)["input_ids"] for answer in answers]
    assert all(len(x) == 1 for x in ids)
    inputs = [torch.tensor([tokenizer(question)["input_ids"]]) for question in questions]
    return torch.cat([model(input_ids=x).logits[:, -1, [i for (i,) in ids]] for x in inputs])


def score(path: str, record: Completions, **options: Any) -> Tensor:
    return Judge(**{**FEW_SHOT, "name": path, **options}).load(CPU)(record)


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_scores_are_those_of_the_whole_question(architecture: str, tmp_path: Path) -> None:
    path = save_judge(tmp_path / "judge", architecture)
    questions = [f"{PREFIX}film: {a}{b}\n:" for a, b in zip(BEFORE, AFTER, strict=True)]
    logits = answer_logits(path, questions, [" bad", " good"])
    record = completions(AFTER, before=BEFORE)
    assert torch.pdist(logits).min() > 1e-3
    for batch_size in (1, 3, 64):
        ours = score(path, record, output="logit", batch_size=batch_size)
        assert_equal(ours, logits[:, 1] - logits[:, 0])
    assert_equal(score(path, record), logits.softmax(dim=-1)[:, 1])


def test_special_tokens_are_added_once(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    policy.language_model.save_pretrained(tmp_path)
    for chat in (None, "<bos>{{ messages[0]['content'] }}"):
        policy.tokenizer.chat_template = chat
        policy.tokenizer.save_pretrained(tmp_path)
        ids = torch.tensor([[1, *policy.tokenizer.convert_tokens_to_ids(["no", "three"])]])
        logits = policy(ids)[0][0, -1]
        expected = logits[policy.tokenizer.convert_tokens_to_ids(["one", "two"])]
        ours = score(
            str(tmp_path), completions(["three"]), template="no {text}", examples=(),
            answers=[" one", " two"], output="logit", chat=chat is not None,
        )  # fmt: skip
        assert_equal(ours, (expected[1] - expected[0])[None])


def test_the_examples_are_run_once(tmp_path: Path) -> None:
    judge = judged_texts(save_judge(tmp_path / "judge"))
    shared, cache = judge._shared
    assert judge.transformer.tokenizer.decode(shared).rstrip() == PREFIX + "film:"
    assert cache is not None
    before = [layer.keys.clone() for layer in cache.layers]
    judge([{"text": text} for text in AFTER])
    assert judge._shared[1] is cache
    for layer, keys in zip(cache.layers, before, strict=True):
        torch.testing.assert_close(layer.keys, keys, rtol=0, atol=0)


def test_a_text_that_joins_the_token_before_it_is_read_whole(tmp_path: Path) -> None:
    path = save_judge(tmp_path / "judge")
    template = "this m{text}\n:"
    texts = ["ovie", "any", "ovie was bad"]  # "movie" is one token, so the first tokens differ
    tokenizer = AutoTokenizer.from_pretrained(path)
    pieces = [tokenizer.tokenize(f"this m{text}") for text in texts]
    assert pieces[0][1] == "Ġmovie"
    assert pieces[1][1:3] == ["Ġ", "m"]
    logits = answer_logits(path, [f"this m{text}\n:" for text in texts], [" bad", " good"])
    ours = score(path, completions(texts), template=template, examples=(), output="logit")
    assert_equal(ours, logits[:, 1] - logits[:, 0])


def test_a_model_without_a_usable_cache_reads_the_whole_question(tmp_path: Path) -> None:
    judge = judged_texts(save_judge(tmp_path / "judge"))
    plain = judged_texts(str(tmp_path / "judge"))
    plain.transformer.fast_paths = replace(plain.transformer.fast_paths, one_prompt=False)
    assert plain._shared == ([], None)
    samples = [{"text": text} for text in AFTER]
    assert_equal(judge(samples), plain(samples))


def judged_texts(path: str) -> AnswerLogits:
    policy = load_policy(path).requires_grad_(False)
    question = Question(
        tokenizer=policy.tokenizer, template=FEW_SHOT["template"], examples=FEW_SHOT["examples"],
        chat=False, system=None,
    )  # fmt: skip
    return AnswerLogits(
        question=question, transformer=policy, passes=policy,
        answers=question.answer_ids(FEW_SHOT["answers"]), batch_size=3,
    )  # fmt: skip


def test_ratings_are_weighted_by_their_probabilities(tmp_path: Path) -> None:
    path = save_judge(tmp_path / "judge")
    ratings = ["1", "2", "5"]
    logits = answer_logits(path, [f"{text}\n" for text in AFTER], ratings)
    probs = logits.softmax(dim=-1)
    expected = probs[:, 0] + 2 * probs[:, 1] + 5 * probs[:, 2]
    options = {"template": "{completion}\n", "examples": (), "answers": ratings}
    assert_equal(score(path, completions(AFTER), output="rating", **options), expected)


def test_a_chat_question_goes_through_the_chat_template(tmp_path: Path) -> None:
    path = save_judge(tmp_path / "judge", chat=CHAT)
    said = [{"role": "system", "content": "x"}, {"role": "user", "content": "far"}]
    record = conversations([said] * 4, AFTER)
    questions = [
        f"<system>far<user>was long good<assistant> good<user>was far{text} good<assistant>"
        for text in AFTER
    ]
    logits = answer_logits(path, questions, [" bad", " good"])
    ours = score(
        path, record, chat=True, system="far", template="was {prompt}{completion} good",
        examples=(Example(text="long", answer=" good"),),
    )  # fmt: skip
    assert_equal(ours, logits.softmax(dim=-1)[:, 1])


def conversations(rows: Sequence[list[dict[str, str]]], texts: Sequence[str]) -> Completions:
    record = completions(texts)
    prompts = PromptBatch(
        tokens=record.prompts.tokens, mask=record.prompts.mask,
        rows=tuple({"prompt": "<rendered>", "messages": row} for row in rows),
    )  # fmt: skip
    return replace(record, prompts=prompts)


def test_a_long_text_is_cut_at_its_end(tmp_path: Path) -> None:
    path = save_judge(tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(path)
    room = 128 - len(tokenizer(f"{PREFIX}film:\n:")["input_ids"])
    long = " was" * 200
    cut = f"{PREFIX}film: x" + " was" * (room - 2) + "\n:"
    assert len(tokenizer(cut)["input_ids"]) == 128
    logits = answer_logits(path, [cut], [" bad", " good"])
    ours = score(path, completions([f"x{long}"]), output="logit")
    assert_equal(ours, logits[:, 1] - logits[:, 0])


@pytest.mark.parametrize(
    "finetune", [Full(), LastLayers(num_layers_unfrozen=1), Lora(rank=2, alpha=4)]
)
def test_the_reference_judges_as_the_model_does_before_training(
    finetune: Full | LastLayers | Lora, tmp_path: Path
) -> None:
    path = save_judge(tmp_path / "judge")
    record = completions(AFTER, before=BEFORE)
    expected = score(path, record)
    policy = load_policy(path)
    reference = finetune.attach(policy, seed=0)
    judge = Judge(**FEW_SHOT)
    assert judge.uses_reference
    reward = judge.load_with_reference(policy, reference)
    halved = WeightedSum(
        terms={"a": Term(weight=0.5, reward=judge), "b": Term(weight=0.5, reward=judge)}
    )
    assert halved.uses_reference
    total = halved.load_with_reference(policy, reference)
    train_a_little(policy)
    assert_equal(reward(record), expected)
    assert_equal(total(record), expected)


def train_a_little(policy: TransformerWithValueHead) -> None:
    weights = [p for p in policy.language_model.parameters() if p.requires_grad]
    assert weights
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "film: {prompt}"}, "has no place for the text"),
        ({"template": "film:"}, "has no place for the text"),
        ({"answers": [" bad", " bad"], "examples": ()}, "' bad' is there twice"),
        ({"answers": [" bad", " no"]}, "the answer ' good' is none of the answers"),
        ({"answers": [" bad", " good", " x"]}, "chooses between 2 of them, and there are 3"),
        ({"output": "rating"}, "output=rating needs numbers"),
        ({"system": "x"}, "set chat=true, or system=null"),
        ({"device": "cpu"}, "device=cpu: name=policy is the run's own reference"),
        ({"revision": "main"}, "revision=main: name=policy"),
        ({"dtype": "bf16"}, "dtype=bf16: name=policy .* leave dtype out"),
        ({"trust_remote_code": True}, "trust_remote_code=True: name=policy"),
        ({"check_label": "bad"}, "check_label=bad is a label of the file check: set check=FILE"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Judge(**{**FEW_SHOT, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"answers": [" bad", " good film"], "examples": ()},
            r"' good film' is not one token of the judge .* but \[' good', ' film'\]",
        ),
        ({"chat": True}, "has no chat template; set reward.chat=false"),
    ],
)
def test_a_judge_that_cannot_answer_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        Judge(**{**FEW_SHOT, "name": save_judge(tmp_path / "judge"), **options}).load(CPU)


def test_answers_that_are_one_token_are_refused(tmp_path: Path) -> None:
    tiny_policy().tokenizer.save_pretrained(tmp_path)
    tiny_policy().language_model.save_pretrained(tmp_path)
    judge = Judge(name=str(tmp_path), template="{text}", answers=[" yes", " never"], dtype="fp32")
    with pytest.raises(ConfigError, match="' yes' and ' never' are the same token"):
        judge.load(CPU)


def test_a_chat_template_that_refuses_the_question_is_named(tmp_path: Path) -> None:
    path = save_judge(tmp_path / "judge", chat="{{ raise_exception('no system message') }}")
    with pytest.raises(ConfigError, match=r"does not take the question .* no system message"):
        Judge(**{**FEW_SHOT, "name": path, "chat": True}).load(CPU)


def test_accuracy_and_auc_on_labelled_texts_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = save_judge(tmp_path / "judge"), tmp_path / "texts.tsv"
    texts = [f"{TEXTS[i % 2][: 5 + i % 20]} {i}" for i in range(220)]
    labels = ["good" if i % 3 else "bad" for i in range(220)]
    lines = [f"{label}\t{text}" for label, text in zip(labels, texts, strict=True)]
    file.write_text("\n".join(["label\ttext", *lines]), encoding="utf-8")
    margins = score(path, completions(texts), output="logit").tolist()
    pairs = [
        (margins[i] > margins[j]) + 0.5 * (margins[i] == margins[j])
        for i in range(220) if labels[i] == "good"
        for j in range(220) if labels[j] == "bad"
    ]  # fmt: skip
    auc = sum(pairs) / len(pairs)
    right = sum((m > 0) == (label == "good") for m, label in zip(margins, labels, strict=True))
    with caplog.at_level(logging.INFO, judge_check.__name__):
        score(path, completions(["x"]), check=str(file))
    said = f"the judge on 220 labelled texts: accuracy {right / 220:.3f}, AUC {auc:.3f}"
    assert said in caplog.messages
    assert auc < 0.6  # random weights
    assert "hardly separates the labelled texts" in caplog.messages[-1]
    caplog.clear()
    with caplog.at_level(logging.INFO, judge_check.__name__):
        score(path, completions(["x"]), check=str(file), check_label="bad")
    assert f"AUC {1 - auc:.3f}" in caplog.messages[0]


def test_a_file_without_the_answer_as_a_label_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "texts.tsv"
    lines = [f"{'yes' if i % 2 else 'no'}\ttext {i}" for i in range(200)]
    file.write_text("\n".join(["label\ttext", *lines]), encoding="utf-8")
    with pytest.raises(ConfigError, match="has the labels no, yes, and the answer ' good'"):
        Judge(**FEW_SHOT, check=str(file)).fingerprint()
    assert Judge(**FEW_SHOT, check=str(file), check_label="yes").fingerprint() == ""
    with pytest.raises(ConfigError, match=r"reward\.check_label=maybe is none of them"):
        Judge(**FEW_SHOT, check=str(file), check_label="maybe").fingerprint()
    with pytest.raises(ConfigError, match=r"reward\.check: .*absent\.tsv"):
        Judge(**FEW_SHOT, check=str(tmp_path / "absent.tsv")).fingerprint()
