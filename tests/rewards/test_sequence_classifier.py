import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from rlhf_exp.models.loading import directory_hash
from rlhf_exp.rewards.protocol import RewardError
from rlhf_exp.rewards.sequence_classifier import SequenceClassifier, SequenceClassifierSettings
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.check_saved import check_saved_classifier
from rlhf_exp.tasks.tokenizers import closed_word_tokenizer
from tests.builders import completions
from tests.rewards.checkpoints import (
    BOS,
    CHAT_TEMPLATE,
    CONTEXT_LEN,
    DECODERS,
    ENCODERS,
    EOS,
    PAD,
    chats,
    direct_logits,
    logits_at,
    look_up,
    save_classifier,
)

CPU = torch.device("cpu")
LONG = " ".join(["one two three four five six"] * 3)
TEXTS = ["one", "two three", LONG, "no . no", "nine", "seven eight zero two four . no"]
ASKS = [{"role": "one", "content": "two three"}]
TALKS = [
    {"role": "no", "content": "four"},
    {"role": "one", "content": "five"},
    {"role": "two", "content": ". ."},
    {"role": "one", "content": "six seven"},
]
# With the role of an answer, which is no word of the vocabulary and so <unk>.
ASSISTANT, UNK = "assistant", 3


def reader(path: str, *, side: str = "right", **settings: object) -> SequenceClassifier:
    return SequenceClassifierSettings(name=path, **settings).open_model(
        CPU, auto_on_cuda=torch.float16, truncation_side=side
    )


def read(path: str, texts: list[str], *, ending: str = "", **settings: object) -> torch.Tensor:
    return reader(path, **settings).logits(completions(texts), suffix=ending)


def assert_equal(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def assert_apart(scores: torch.Tensor) -> None:
    """That the test could tell two rows for one another."""
    assert torch.pdist(scores).min() > 1e-3


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("architecture", [*DECODERS, *ENCODERS])
@pytest.mark.sampled
def test_a_batch_gives_what_the_model_gives_for_each_text(
    architecture, num_labels, padding_side, tmp_path
):
    frame = "<bos> $A <eos>" if architecture in ENCODERS else "$A"
    path = save_classifier(
        tmp_path,
        architecture,
        num_labels=num_labels,
        frame=frame,
        padding_side=padding_side,
        max_position_embeddings=CONTEXT_LEN + 2,
    )
    rows = [look_up(path, frame.replace("$A", text)) for text in TEXTS]
    expected = direct_logits(path, rows)
    assert_apart(expected)
    for batch_size in (1, 2, 64):
        ours = read(path, TEXTS, batch_size=batch_size)
        assert ours.shape == (len(TEXTS), num_labels)
        assert_equal(ours, expected)


@pytest.mark.parametrize("architecture", DECODERS)
def test_an_answer_is_read_at_the_last_token_that_is_not_padding(architecture, tmp_path):
    # With EOS for padding that is the token before the EOS that ends a text, and not one before an
    # EOS within it.
    path = save_classifier(tmp_path, architecture, pad_is_eos=True, padding_side="left")
    texts = ["one two three<eos>", "one<eos> two", "four", "one two<eos><eos>", LONG]
    positions = [2, 2, 0, 1, 17]
    rows = [look_up(path, text.replace("<eos>", " <eos>")) for text in texts]
    expected = torch.cat([logits_at(path, r, p) for r, p in zip(rows, positions, strict=True)])
    assert_apart(expected)
    assert_equal(direct_logits(path, rows), expected)
    for batch_size in (1, 2, 5):
        assert_equal(read(path, texts, batch_size=batch_size), expected)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_padding_is_what_the_model_takes_for_it_and_not_the_tokenizers(architecture, tmp_path):
    # The tokenizer pads with <pad>, but the model was saved to look for <unk>.
    path = save_classifier(tmp_path, architecture, pad_token_id=UNK)
    ours = read(path, TEXTS)
    assert_equal(ours, direct_logits(path, [look_up(path, text) for text in TEXTS]))


@pytest.mark.filterwarnings("ignore:.*pad_token_id")
def test_a_padding_token_that_no_model_has_gives_way_to_the_tokenizers(tmp_path):
    path = save_classifier(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": -1}))
    model = reader(path)
    assert model.model.config.pad_token_id == PAD
    rows = [look_up(path, text) for text in TEXTS]
    assert_equal(model.logits(completions(TEXTS)), direct_logits(path, rows))


def test_a_padding_token_behind_the_embeddings_is_refused(tmp_path):
    path = save_classifier(tmp_path, "llama")
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    expected = r"reward\.name=.*: its padding token is 16, but the model has 16 tokens; resize"
    with pytest.raises(ConfigError, match=expected):
        reader(path)


def test_an_empty_text_scores_the_same_in_any_batch(tmp_path):
    path = save_classifier(tmp_path, "gpt2")
    alone = read(path, [""])
    assert_equal(alone, direct_logits(path, [[PAD]]))
    assert_equal(read(path, ["", LONG, "one"])[:1], alone)


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "distilbert", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("frame", ["$A", "<bos> $A <eos>"])
def test_a_text_is_cut_to_what_the_model_reads(architecture, side, frame, tmp_path):
    path = save_classifier(tmp_path, architecture, frame=frame)
    words = (LONG + " seven eight nine zero . no one two three").split()
    room = CONTEXT_LEN - (2 if "<bos>" in frame else 0)
    kept = words[:room] if side == "right" else words[-room:]
    ours = read(path, [" ".join(words), "one"], side=side)
    expected = direct_logits(path, [look_up(path, frame.replace("$A", " ".join(kept)))])
    assert_equal(ours[:1], expected)
    other = words[-room:] if side == "right" else words[:room]
    assert (read(path, [" ".join(other)]) - expected).abs().max() > 1e-4


def test_roberta_has_fewer_positions_than_it_says(tmp_path):
    path = save_classifier(tmp_path, "roberta", pad_token_id=1)
    words = (LONG + " seven eight nine zero").split()
    assert reader(path).max_tokens == CONTEXT_LEN - 2
    expected = direct_logits(path, [look_up(path, " ".join(words[:18]))])
    assert_equal(read(path, [" ".join(words)]), expected)


@pytest.mark.parametrize(("of_tokenizer", "limit"), [(4, 4), (50, CONTEXT_LEN)])
def test_the_shorter_limit_of_model_and_tokenizer_holds(of_tokenizer, limit, tmp_path):
    path = save_classifier(tmp_path, "gpt2")
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    tokenizer.model_max_length = of_tokenizer
    tokenizer.save_pretrained(path)
    words = (LONG + " seven eight nine zero").split()
    assert reader(path).max_tokens == limit
    expected = direct_logits(path, [look_up(path, " ".join(words[:limit]))])
    assert_equal(read(path, [" ".join(words)]), expected)


def test_a_model_without_limit_reads_everything(tmp_path):
    path = save_classifier(tmp_path, "bloom", n_head=2, n_layer=2)
    assert reader(path).max_tokens is None
    text = " ".join([LONG] * 5)
    assert_equal(read(path, [text]), direct_logits(path, [look_up(path, text)]))


def test_an_ending_is_put_behind_a_completion_that_lacks_it(tmp_path):
    path = save_classifier(tmp_path, "llama", frame="<bos> $A")
    record = completions([" two three", " two three<eos>", ""], before=["one", "one", "six<eos>"])
    ours = reader(path).logits(record, suffix="<eos>")
    expected = direct_logits(path, [[BOS, 5, 6, 7, EOS], [BOS, 10, EOS, EOS]])
    assert_equal(ours, expected[[0, 0, 1]])
    without = reader(path).logits(record)
    expected = direct_logits(path, [[BOS, 5, 6, 7], [BOS, 5, 6, 7, EOS], [BOS, 10, EOS]])
    assert_equal(without, expected)


def test_a_conversation_is_rendered_by_the_classifiers_own_template(tmp_path):
    # Its tokenizer puts BOS before texts, and its template spells BOS out: there is one.
    path = save_classifier(tmp_path, "llama", frame="<bos> $A", chat_template=CHAT_TEMPLATE)
    record = chats([ASKS, TALKS], ["eight nine", ""])
    ours = reader(path).logits(record, suffix="<eos>")
    asked = [BOS, *look_up(path, "one two three"), EOS]
    talked = look_up(path, "no four <eos> one five <eos> two . . <eos> one six seven <eos>")
    rows = [
        [*asked, UNK, *look_up(path, "eight nine"), EOS],
        [BOS, *talked, UNK, EOS],
    ]
    assert_equal(ours, direct_logits(path, rows))
    assert record.prompts.rows[0]["messages"] == ASKS  # untouched
    assert len(ASKS) == 1


def test_a_conversation_is_cut_too(tmp_path):
    path = save_classifier(tmp_path, "llama", chat_template=CHAT_TEMPLATE)
    record = chats([ASKS], [LONG])
    row = [BOS, *look_up(path, f"one two three <eos> {ASSISTANT}".replace(ASSISTANT, "<unk>"))]
    row += [*look_up(path, LONG), EOS]
    assert_equal(reader(path).logits(record), direct_logits(path, [row[:CONTEXT_LEN]]))
    ours = reader(path, side="left").logits(record)
    assert_equal(ours, direct_logits(path, [row[-CONTEXT_LEN:]]))


def test_without_a_template_of_its_own_a_conversation_is_the_text_that_the_policy_read(tmp_path):
    path = save_classifier(tmp_path, "llama", frame="<bos> $A")
    ours = reader(path).logits(chats([ASKS], [" eight"]), suffix="<eos>")
    expected = direct_logits(path, [[BOS, *look_up(path, "no no eight"), EOS]])
    assert_equal(ours, expected)


def test_a_template_is_not_for_prompts_that_are_texts(tmp_path):
    path = save_classifier(tmp_path, "llama", chat_template=CHAT_TEMPLATE)
    assert_equal(read(path, ["one two"]), direct_logits(path, [look_up(path, "one two")]))


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    template = "{{ raise_exception('no system role') }}"
    path = save_classifier(tmp_path, "llama", chat_template=template)
    expected = r"reward\.name=.* cannot read the prompt 'no no' with the completion 'two': no syst"
    with pytest.raises(RewardError, match=expected):
        reader(path).logits(chats([ASKS], ["two"]))


def test_a_text_that_a_closed_vocabulary_lacks_is_named(tmp_path):
    path = save_classifier(tmp_path, "llama")
    closed_word_tokenizer(["one", "two"], pad="<pad>", eos="<eos>").save_pretrained(path)
    expected = "cannot read the prompt '' with the completion 'one three'"
    with pytest.raises(RewardError, match=expected):
        read(path, ["one two", "one three"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_weights_have_the_dtype_and_logits_are_fp32(dtype, tmp_path):
    path = save_classifier(tmp_path, "llama")
    model = reader(path, dtype=dtype)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {p.dtype for p in model.model.parameters()} == {wanted}
    assert model.logits(completions(TEXTS)).dtype == torch.float32
    auto = reader(path)
    assert auto.model.dtype == torch.float32  # on a CPU


def test_logits_can_stand_in_a_loss_and_nothing_is_kept_for_more_tokens(tmp_path):
    model = reader(save_classifier(tmp_path, "llama"))
    outputs = []
    model.model.model.register_forward_hook(lambda *args: outputs.append(args[-1]))
    logits = model.logits(completions(TEXTS))
    assert not logits.requires_grad
    assert not logits.is_inference()
    assert [output.past_key_values for output in outputs] == [None]


@pytest.mark.parametrize(("batch_size", "rows"), [(4, [4, 2]), (6, [6]), (64, [6])])
def test_a_forward_pass_has_so_many_texts(batch_size, rows, tmp_path):
    model = reader(save_classifier(tmp_path, "llama"), batch_size=batch_size)
    seen = []
    model.model.score.register_forward_hook(lambda *args: seen.append(len(args[-1])))
    model.logits(completions(TEXTS))
    assert seen == rows


def test_dropout_is_off(tmp_path):
    path = save_classifier(tmp_path, "gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    assert torch.equal(read(path, TEXTS), read(path, TEXTS))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:2", r"^reward\.device=cuda:2: this machine has 2 CUDA device\(s\), counted from"),
        ("gpu", r"^reward\.device=gpu: use auto, cpu, cuda"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, message, tmp_path, monkeypatch):
    path = save_classifier(tmp_path, "gpt2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        reader(path, device=device)


def test_a_machine_without_cuda_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^reward\.device=cuda: this machine has no CUDA"):
        reader(save_classifier(tmp_path, "gpt2"), device="cuda")


def test_the_model_is_where_it_is_told_or_else_where_the_policy_is(tmp_path):
    path = save_classifier(tmp_path, "gpt2")
    meta = torch.device("meta")  # a device that every machine has
    for device, where in ((None, "meta"), ("cpu", "cpu")):
        model = SequenceClassifierSettings(name=path, device=device).open_model(
            meta, auto_on_cuda=torch.float16, truncation_side="right"
        )
        assert model.model.device.type == where


def test_a_revision_is_for_names_of_the_hub(tmp_path):
    path = save_classifier(tmp_path, "gpt2")
    with pytest.raises(ConfigError, match=r"reward\.revision=main is for hub names"):
        reader(path, revision="main")


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    path = save_classifier(tmp_path / "model", "gpt2")
    (Path(path) / "own.py").write_text(
        "from transformers import GPT2Config, GPT2ForSequenceClassification\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own'\n"
        "class Own(GPT2ForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    file = Path(path) / "config.json"
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.Own"}
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"model_type": "own", "auto_map": code})
    )
    with pytest.raises(ConfigError, match=r"set reward\.trust_remote_code=true"):
        reader(path)
    trusted = reader(path, trust_remote_code=True).model
    assert type(trusted).__name__ == "Own"
    # A run that finetunes it saves it, and reads it again.
    trusted.save_pretrained(tmp_path / "saved")
    hf.AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "saved")
    check_saved_classifier(trusted, tmp_path / "saved")


def test_the_fingerprint_follows_the_files(tmp_path):
    path = save_classifier(tmp_path / "run" / "model", "gpt2")
    settings = SequenceClassifierSettings(name=str(tmp_path / "run"))
    first = settings.fingerprint()
    assert first == directory_hash(path) != ""
    (Path(path) / "more").write_text("")
    assert settings.fingerprint() == first
    (Path(path) / "config.json").write_text("{}")
    assert settings.fingerprint() != first
    assert SequenceClassifierSettings(name="nobody/nothing").fingerprint() == ""
    with pytest.raises(ConfigError, match=r"^reward\.name='/missing': no such directory"):
        SequenceClassifierSettings(name="/missing").fingerprint()
