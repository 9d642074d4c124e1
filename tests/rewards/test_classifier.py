import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_exp.models.loading import directory_hash, load_classifier
from rlhf_exp.models.scratch import ScratchClassifier
from rlhf_exp.rewards.classifier import Classifier, label_probability
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.classifier import with_leading_bos
from tests.builders import build_tokenizer, completions, stretch

CPU = torch.device("cpu")
LONG = " ".join(["one two three four five"] * 3)
TEXTS = ["one", "two three", LONG, "no . no", "", "nine", "seven eight zero two four . no"]


def save(path: Path, labels: tuple[str, ...]) -> str:
    tokenizer = with_leading_bos(build_tokenizer())
    settings = ScratchClassifier(d_model=16, context_len=20, dropout=0.5, head_dropout=0.5)
    model = settings.classifier(tokenizer, labels, seed=0)
    stretch(model, seed=0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("classifier"), ("NEGATIVE", "neutral", "POSITIVE"))


def scores(name: str, texts: list[str], **settings: object) -> torch.Tensor:
    settings = settings or {"label": "POSITIVE"}
    return Classifier(name=name, **settings).load(CPU)(completions(texts))


@torch.no_grad()
def by_hand(name: str, text: str) -> list[float]:
    """Each label's probability, the text run by itself, its ids looked up word by word."""
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    vocab = AutoTokenizer.from_pretrained(name).get_vocab()
    ids = torch.tensor([[1, *(vocab[word] for word in text.split())]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].tolist()
    total = math.fsum(map(math.exp, logits))
    return [math.exp(logit) / total for logit in logits]


def test_scores_are_the_softmax_of_a_direct_forward(name):
    expected = [by_hand(name, text) for text in TEXTS]
    for index, label in enumerate(("NEGATIVE", "neutral", "POSITIVE")):
        ours = scores(name, TEXTS, label=label)
        assert ours.shape == (len(TEXTS),)
        assert ours.dtype == torch.float32
        assert ours.tolist() == pytest.approx([probs[index] for probs in expected], abs=1e-6)
    spread = scores(name, TEXTS)
    assert spread.max() - spread.min() > 0.05  # the texts are told apart


def test_prompt_and_completion_are_read_together(name):
    record = completions([" two three", "two"], before=["one", ""])
    ours = Classifier(name=name, label="POSITIVE").load(CPU)(record)
    together = scores(name, ["one two three", "two"])
    assert torch.equal(ours, together)
    assert (together - scores(name, ["two three", "two"])).abs().max() > 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_batching_and_the_padding_it_brings_change_nothing(name, batch_size):
    alone = torch.cat([scores(name, [text]) for text in TEXTS])
    batched = scores(name, TEXTS, label="POSITIVE", batch_size=batch_size)
    torch.testing.assert_close(batched, alone, rtol=0, atol=1e-6)


def test_what_is_too_long_is_cut_at_the_end(name):
    # Twenty positions, one of them BOS: nineteen words are read.
    words = (LONG + " six seven eight nine").split()
    assert len(words) == 19
    longer = " ".join([*words, *["no"] * 30])
    ours = scores(name, [longer, "one", " ".join(words)])
    assert ours[0].item() == pytest.approx(ours[2].item(), abs=1e-6)
    assert ours[2].item() == pytest.approx(by_hand(name, " ".join(words))[2], abs=1e-6)
    assert abs(ours[2] - scores(name, [" ".join(words[:-1])])) > 1e-4


def test_the_tokenizers_limit_holds_if_it_is_shorter(name, tmp_path):
    path = save(tmp_path, ("neg", "pos"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.model_max_length = 4
    tokenizer.save_pretrained(path)
    ours = scores(path, ["one two three four five", "one two three"], label="pos")
    assert ours[0].item() == pytest.approx(ours[1].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "direction", "index"),
    [
        (("NEGATIVE", "neutral", "POSITIVE"), "pos", 2),
        (("NEGATIVE", "neutral", "POSITIVE"), "neg", 0),
        (("positive", "negative"), "pos", 0),
        (("positive", "negative"), "neg", 1),
        (("Neg", "Pos"), "pos", 1),
    ],
)
def test_a_direction_is_a_label_by_how_it_begins(labels, direction, index, tmp_path):
    path = save(tmp_path, labels)
    ours = scores(path, TEXTS[:3], direction=direction)
    by_label = scores(path, TEXTS[:3], label=labels[index])
    assert torch.equal(ours, by_label)
    expected = [by_hand(path, text)[index] for text in TEXTS[:3]]
    assert ours.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_probabilities_of_all_labels_are_one(name):
    total = sum(scores(name, TEXTS, label=label) for label in ("NEGATIVE", "neutral", "POSITIVE"))
    torch.testing.assert_close(total, torch.ones(len(TEXTS)))


@pytest.mark.parametrize("label", ["positive", "POS", "happy", "0"])
def test_a_label_that_does_not_exist_is_refused(name, label):
    expected = rf"label='{label}'.*has no such label; set reward.label to one of NEGATIVE, neutral"
    with pytest.raises(ConfigError, match=expected):
        Classifier(name=name, label=label).load(CPU)


def test_a_direction_that_no_label_has_is_refused(tmp_path):
    path = save(tmp_path, ("happy", "sad"))
    expected = r"direction='pos'.*to one of happy, sad and reward\.direction=null"
    with pytest.raises(ConfigError, match=expected):
        Classifier(name=path, direction="pos").load(CPU)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "label=None and direction=None: set exactly one"),
        (
            {"label": "pos", "direction": "pos"},
            "label=pos and direction=pos: set exactly one, the other null",
        ),
        ({"direction": "up"}, "'pos' or 'neg'"),
        ({"label": "pos", "batch_size": 0}, "greater than or equal to 1"),
        ({"label": "pos", "dtype": "int8"}, "'auto', 'fp32', 'fp16' or 'bf16'"),
    ],
)
def test_settings_that_name_no_label_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        Classifier(name="any", **wrong)


def test_a_classifier_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"reward\.name=.*no such directory"):
        Classifier(name=str(tmp_path / "missing"), direction="pos").load(CPU)


@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16"])
def test_scores_are_fp32_and_near_in_any_dtype(name, dtype):
    ours = scores(name, TEXTS, label="POSITIVE", dtype=dtype)
    assert ours.dtype == torch.float32
    if dtype == "bf16":  # eight bits of mantissa
        assert not torch.equal(ours, scores(name, TEXTS))
        torch.testing.assert_close(ours, scores(name, TEXTS), rtol=0, atol=0.05)
    else:  # auto on a CPU is fp32
        assert torch.equal(ours, scores(name, TEXTS))


def test_dropout_is_off(name):
    function = Classifier(name=name, label="POSITIVE").load(CPU)
    record = completions(TEXTS)
    assert torch.equal(function(record), function(record))


def test_scores_can_stand_in_a_loss(name):
    ours = scores(name, TEXTS)
    assert not ours.is_inference()
    assert not ours.requires_grad
    weight = torch.ones(len(TEXTS), requires_grad=True)
    (weight * ours).sum().backward()
    assert torch.equal(weight.grad, ours)
    batch = label_probability(*load_classifier(name, dtype=torch.float32), TEXTS, 2)
    assert torch.equal(batch, ours)
    assert not batch.is_inference()


def test_the_fingerprint_follows_the_files_of_the_classifier(tmp_path):
    path = save(tmp_path / "run" / "model", ("neg", "pos"))
    reward = Classifier(name=str(tmp_path / "run"), direction="pos")
    first = reward.fingerprint()
    assert first == reward.fingerprint() == directory_hash(path) != ""
    save(tmp_path / "run" / "model", ("neg", "neutral", "pos"))
    assert reward.fingerprint() != first
    assert Classifier(name="artifact:classifier", direction="pos").fingerprint() == ""
    assert Classifier(name="lvwerra/distilbert-imdb", direction="pos").fingerprint() == ""
    with pytest.raises(ConfigError, match=r"^reward\.name='/missing': no such directory"):
        Classifier(name="/missing", direction="pos").fingerprint()
