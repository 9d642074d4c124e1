import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_exp.models.classifiers import with_leading_bos
from rlhf_exp.models.loading import directory_hash
from rlhf_exp.models.scratch import ScratchClassifier
from rlhf_exp.rewards.classifier import Classifier
from rlhf_exp.settings import ConfigError
from tests.builders import build_tokenizer, completions, stretch
from tests.rewards.checkpoints import (
    BOS,
    CHAT_TEMPLATE,
    CONTEXT_LEN,
    EOS,
    chats,
    direct_logits,
    look_up,
    save_classifier,
)

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


@pytest.mark.parametrize("label", ["positive", "POS", "happy", "0", ""])
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
        (
            {"label": True},
            r"a label is a name or an index, not a boolean; .*reward\.label=\"true\"",
        ),
        ({"label": False}, r"reward\.label=\"false\""),
        ({"label": 1.0}, r"a name or an index, not a float; .*reward\.label=\"1\.0\""),
        ({"label": "pos", "output": "odds"}, "'prob', 'logprob' or 'logit'"),
        ({"label": "pos", "truncation_side": "both"}, "'right' or 'left'"),
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


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


OUTPUTS = {
    (True, "prob"): lambda row, i: math.exp(row[i]) / math.fsum(map(math.exp, row)),
    (True, "logprob"): lambda row, i: row[i] - math.log(math.fsum(map(math.exp, row))),
    (True, "logit"): lambda row, i: row[i],
    (False, "prob"): lambda row, i: sigmoid(row[i]),
    (False, "logprob"): lambda row, i: math.log(sigmoid(row[i])),
    (False, "logit"): lambda row, i: row[i],
}


@pytest.mark.parametrize(("exclusive", "output"), OUTPUTS)
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "llama", "qwen2"])
def test_an_output_is_what_its_formula_says(architecture, exclusive, output, tmp_path):
    problem = None if exclusive else "multi_label_classification"
    path = save_classifier(tmp_path, architecture, num_labels=3, problem_type=problem)
    texts = [text for text in TEXTS if text]
    rows = direct_logits(path, [look_up(path, text) for text in texts]).tolist()
    for index in range(3):
        ours = scores(path, texts, label=f"LABEL_{index}", output=output)
        expected = [OUTPUTS[exclusive, output](row, index) for row in rows]
        assert ours.dtype == torch.float32
        assert ours.tolist() == pytest.approx(expected, abs=1e-5)
        assert max(expected) - min(expected) > 1e-3


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_the_log_of_a_probability_that_rounds_to_zero_is_finite(problem, tmp_path):
    path = save_classifier(tmp_path, "llama", num_labels=2, problem_type=problem)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.score.weight.mul_(1000)
    model.save_pretrained(path)
    row = direct_logits(path, [look_up(path, "one")])[0].double()
    worst = int(row.argmin())
    odds = row - row.max() if problem.startswith("single") else row
    assert odds[worst] < -200
    log = scores(path, ["one"], label=worst, output="logprob")
    assert log.item() == pytest.approx(odds[worst].item(), rel=1e-5)
    assert scores(path, ["one"], label=worst).item() == 0


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_label_may_be_an_index(name, index):
    by_name = scores(name, TEXTS, label=("NEGATIVE", "neutral", "POSITIVE")[index])
    assert torch.equal(scores(name, TEXTS, label=index), by_name)


STARS = ("1", "2", "3", "4", "5")


@pytest.mark.parametrize("label", [1, "1", 3, 5, "5"])
def test_a_number_is_a_name_before_it_is_an_index(label, tmp_path):
    path = save(tmp_path, STARS)
    expected = [by_hand(path, text)[STARS.index(str(label))] for text in TEXTS[:3]]
    assert scores(path, TEXTS[:3], label=label).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_name_of_digits_is_not_an_index(tmp_path):
    path = save(tmp_path, ("1", "0"))
    by_number = scores(path, TEXTS, label=0)
    assert torch.equal(scores(path, TEXTS, label="0"), by_number)
    assert not torch.equal(scores(path, TEXTS, label="1"), by_number)


@pytest.mark.parametrize(
    ("labels", "choice", "message"),
    [
        # An index among names that are numbers may be meant as a name.
        (STARS, {"label": 0}, r"reward\.label=0: .* no such label; .* one of 1, 2, 3, 4, 5$"),
        (STARS, {"label": 6}, r"reward\.label=6: .* no such label"),
        (("1 star", "2 stars"), {"label": 1}, "no such label; .* one of 1 star, 2 stars$"),
        (("-1", "+1"), {"label": 1}, "no such label"),
        (("0.5", "1.0"), {"label": 1}, "no such label"),
        (("a", "b", "a"), {"label": "a"}, r"several such labels; .* an index from 0 to 2"),
        (("pos", "positive"), {"direction": "pos"}, r"reward\.direction='pos': .* several such"),
    ],
)
def test_a_label_that_could_be_several_is_refused(labels, choice, message):
    with pytest.raises(ConfigError, match=message):
        Classifier(name="any", **choice).find_label(labels)


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_beyond_the_labels_is_refused(name, index):
    expected = (
        rf"reward\.label={index}: .* one of NEGATIVE, neutral, POSITIVE, or an index from 0 to 2"
    )
    with pytest.raises(ConfigError, match=expected):
        Classifier(name=name, label=index).load(CPU)


def test_a_model_with_one_output_is_for_the_other_reward(tmp_path):
    path = save_classifier(tmp_path, "llama", num_labels=1)
    with pytest.raises(ConfigError, match=r"has 1 output .* reward model is for reward=pair_model"):
        Classifier(name=path, label=0).load(CPU)


def test_outputs_that_are_no_probabilities_can_be_had_as_they_are(tmp_path):
    path = save_classifier(tmp_path, "llama", num_labels=2, problem_type="regression")
    for output in ("prob", "logprob"):
        expected = rf"reward\.output={output}: .*problem_type=regression.*set reward\.output=logit"
        with pytest.raises(ConfigError, match=expected):
            Classifier(name=path, label=0, output=output).load(CPU)
    expected = direct_logits(path, [look_up(path, "one two")])[0, 1].item()
    ours = scores(path, ["one two"], label=1, output="logit")
    assert ours.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_side_that_is_cut_can_be_chosen(side, tmp_path):
    path = save_classifier(tmp_path, "bert", num_labels=2)
    words = (LONG + " six seven eight nine zero . no").split()
    assert len(words) > CONTEXT_LEN
    kept = words[:CONTEXT_LEN] if side == "right" else words[-CONTEXT_LEN:]
    expected = direct_logits(path, [look_up(path, " ".join(kept))])[0, 1].item()
    chosen = {"truncation_side": side} if side == "left" else {}
    ours = scores(path, [" ".join(words)], label=1, output="logit", **chosen)
    assert ours.item() == pytest.approx(expected, abs=1e-5)


def test_a_conversation_is_read_with_its_answer_and_no_eos_is_added(tmp_path):
    path = save_classifier(tmp_path, "llama", num_labels=2, chat_template=CHAT_TEMPLATE)
    record = chats([[{"role": "one", "content": "two"}]], ["four"])
    ours = Classifier(name=path, label=1, output="logit").load(CPU)(record)
    rows = [[BOS, *look_up(path, "one two"), EOS, 3, *look_up(path, "four"), EOS]]
    assert ours.item() == pytest.approx(direct_logits(path, rows)[0, 1].item(), abs=1e-5)
    plain = Classifier(name=path, label=1, output="logit").load(CPU)(completions(["two"]))
    expected = direct_logits(path, [look_up(path, "two")])[0, 1].item()
    assert plain.item() == pytest.approx(expected, abs=1e-5)


def test_scores_are_where_the_policy_is(name):
    function = Classifier(name=name, label=0, device="cpu").load(torch.device("meta"))
    assert function(completions(TEXTS)).device.type == "meta"


@pytest.mark.gpu
def test_auto_is_half_precision_on_cuda(name):
    cuda = torch.device("cuda")
    ours = Classifier(name=name, label=0).load(cuda)(completions(TEXTS))
    half = Classifier(name=name, label=0, dtype="fp16").load(cuda)(completions(TEXTS))
    assert (ours.dtype, ours.device.type) == (torch.float32, "cuda")
    assert torch.equal(ours, half)


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
