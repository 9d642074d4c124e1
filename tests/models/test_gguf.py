"""Models from GGUF files, which llama.cpp's own package wrote: they give the logits of the models
that were written, train, and are saved as ordinary directories."""

import json
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_exp.models.loading import Pretrained, load_language_model, load_policy
from rlhf_exp.models.saving import save_policy
from rlhf_exp.settings import ConfigError
from tests.app.test_run import OWN_MODEL, TINY, assert_refused, train
from tests.gguf_files import ARCHITECTURES, TEXTS, train_tokenizer, write_gguf

TOKENS = torch.tensor([[5, 9, 20, 33, 7, 2], [3, 3, 8, 60, 61, 40]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_gives_the_logits_of_the_model_that_was_written(
    architecture: str, tmp_path: Path
) -> None:
    written = write_gguf(tmp_path / "model.gguf", architecture)
    model, tokenizer = load_language_model(str(tmp_path / "model.gguf"))
    torch.testing.assert_close(model(TOKENS).logits, written(TOKENS).logits, rtol=0, atol=1e-5)
    assert model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer(TEXTS[0])["input_ids"] == train_tokenizer().encode(TEXTS[0]).ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (
        0,
        1,
        "left",
    )
    chat = [{"role": "user", "content": TEXTS[0]}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == TEXTS[0]


def test_eight_bits_are_dequantised(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "model.gguf", "llama", quantised=True)
    model, _ = load_language_model(str(tmp_path / "model.gguf"))
    for name, weight in written.state_dict().items():
        # A block of 32 numbers has one scale, its largest number / 127.
        error = (model.state_dict()[name] - weight).abs().max()
        assert error <= weight.abs().max() / 127 / 2 + 1e-3 * weight.abs().max()
    assert (model(TOKENS).logits - written(TOKENS).logits).abs().max() > 1e-4, "nothing was rounded"


def test_a_policy_is_saved_as_an_ordinary_directory(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", quantised=True)
    policy = load_policy(tmp_path / "model.gguf")
    save_policy(policy, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(other(TOKENS).logits, policy(TOKENS)[0], rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer(TEXTS[1])["input_ids"] == policy.tokenizer(TEXTS[1])["input_ids"]


def test_a_file_of_a_directory_is_chosen_by_its_key(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "b.gguf", "qwen2")
    write_gguf(tmp_path / "a.gguf", "llama")
    settings = Pretrained(base_model=str(tmp_path), gguf_file="b.gguf")
    model, _ = settings.language_model(None, seed=0)
    assert torch.equal(model.lm_head.weight, written.lm_head.weight)
    skeleton = settings.skeleton()
    assert skeleton is not None
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    other = Pretrained(base_model=str(tmp_path / "a.gguf"))
    assert settings.fingerprint() == Pretrained(base_model=settings.source).fingerprint()
    assert len(other.fingerprint()) == 64
    assert other.fingerprint() != settings.fingerprint()
    with pytest.raises(ValidationError, match=r"names a file already; set gguf_file=null"):
        Pretrained(base_model=str(tmp_path / "a.gguf"), gguf_file="b.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.gguf", r"cannot be loaded: it is cut off, or transformers does not read its arch"),
        ("begun.gguf", r"cannot be loaded: it is cut off, or transformers does not read its arch"),
        ("text.gguf", r"cannot be loaded: it is cut off.*\n.*not a GGUF file"),
        ("other.gguf", r"(?s)cannot be loaded: .*rwkv6"),
        ("none.gguf", r"none\.gguf'?: no such file$"),
        ("", r"holds GGUF files: name one of them, \S+begun\.gguf$"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", "llama")
    content = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "begun.gguf").write_bytes(content[:10])
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "other.gguf").write_bytes(content.replace(b"llama", b"rwkv6"))
    with pytest.raises(ConfigError, match=message) as caught:
        load_language_model(str(tmp_path / name))
    assert str(caught.value).startswith(f"model.base_model={str(tmp_path / name)!r}")


def test_a_revision_is_for_hub_names(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama")
    message = re.escape("model.revision=main is for hub names") + ".*is a file: set it null"
    with pytest.raises(ConfigError, match=message):
        load_language_model(str(tmp_path / "model.gguf"), revision="main")


def test_a_run_trains_a_file_and_saves_a_directory(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", quantised=True)
    tiny = [*OWN_MODEL, *(word for word in TINY if word.startswith(("stage.", "schedule.")))]
    words = ["model=local", "model.base_model=model.gguf", "task=prefix", "logger=local"]
    words += ["task.prefix=this movie was", "reward=length"]
    outcome = train(tmp_path, *tiny, *words)
    assert (outcome.code, outcome.raised) == (0, None), outcome.out + outcome.err
    [run] = tmp_path.glob("outputs/run/*")
    assert load_policy(run).language_model.config.model_type == "llama"
    refused = train(tmp_path, *tiny, *words, "model.base_model=nowhere.gguf")
    assert_refused(refused, r"model\.base_model='nowhere\.gguf': no such file")
    of_hub = train(tmp_path, *tiny, *words, "model.base_model=some/one", "model.gguf_file=a.gguf")
    assert_refused(of_hub, r"'some/one': \S+ is out of reach and a\.gguf is not in the local cache")
