"""Classifiers on pretrained models: the body is the saved one, the head is new."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from rlhf_exp.models.classifiers import build_classifier, head_modules, load_classifier
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.settings import ConfigError
from tests.builders import build_tokenizer, stretch
from tests.gguf_files import write_gguf

LABELS = ("bad", "good", "so so")
ARCHITECTURES = ("bert", "distilbert", "llama", "gpt2")


def save_body(path: Path, architecture: str, *, auto: type = hf.AutoModel) -> hf.PreTrainedModel:
    """A tiny pretrained model without a classifier's head."""
    tokenizer = build_tokenizer()
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture != "gpt2":
        small["hidden_dim" if architecture == "distilbert" else "intermediate_size"] = 32
    config = hf.AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), max_position_embeddings=20, **small
    )
    torch.manual_seed(3)
    model = auto.from_config(config)
    stretch(model, seed=3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_body_is_the_saved_one_and_the_head_is_of_the_seed(
    architecture: str, tmp_path: Path
) -> None:
    saved = save_body(tmp_path, architecture).state_dict()
    model = Pretrained(base_model=str(tmp_path))
    first, same, other = (
        build_classifier(model, build_tokenizer, LABELS, seed=seed) for seed in (0, 0, 1)
    )
    body = first.network.base_model.state_dict()
    assert body.keys() == saved.keys()
    assert all(torch.equal(body[name], tensor) for name, tensor in saved.items())
    heads = [torch.cat([p.flatten() for p in head_modules(c.network).parameters()])
             for c in (first, same, other)]  # fmt: skip
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert len(heads[0]) >= 3 * 16
    config = first.network.config
    assert [config.id2label[i] for i in range(3)] == [*LABELS]
    assert config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert first.max_tokens == 20
    assert first.tokenizer.padding_side == "right"
    assert first.network.dtype == torch.float32


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_it_reloads_as_a_reward(architecture: str, tmp_path: Path) -> None:
    save_body(tmp_path / "body", architecture)
    model = Pretrained(base_model=str(tmp_path / "body"))
    built = build_classifier(model, build_tokenizer, LABELS, seed=0)
    built.network.save_pretrained(tmp_path / "saved")
    built.tokenizer.save_pretrained(tmp_path / "saved")
    network, tokenizer = load_classifier(str(tmp_path / "saved"), dtype=torch.float32)
    tokens = torch.tensor([tokenizer("one two three")["input_ids"]])
    built.network.eval()
    assert torch.equal(network(tokens).logits, built.network(tokens).logits)
    # A head for other labels is drawn anew.
    again = Pretrained(base_model=str(tmp_path / "saved"))
    two = build_classifier(again, build_tokenizer, ("a", "b"), seed=0)
    assert two.network.config.num_labels == 2
    for name, weight in two.network.base_model.state_dict().items():
        assert torch.equal(weight, network.base_model.state_dict()[name])


def test_a_model_for_masked_words_has_no_pooler(tmp_path: Path) -> None:
    save_body(tmp_path, "bert", auto=hf.AutoModelForMaskedLM)
    built = build_classifier(Pretrained(base_model=str(tmp_path)), build_tokenizer, LABELS, seed=0)
    assert torch.isfinite(built.network.bert.pooler.dense.weight).all()


def test_a_gguf_file_gives_a_body(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "model.gguf", "llama")
    model = Pretrained(base_model=str(tmp_path / "model.gguf"))
    built = build_classifier(model, build_tokenizer, LABELS, seed=0)
    state = built.network.base_model.state_dict()
    for name, weight in written.model.state_dict().items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-6)
    built.network.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").is_file()


def test_a_body_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model = save_body(tmp_path, "bert")
    kept = {n: w for n, w in model.state_dict().items() if "layer.1.attention" not in n}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ConfigError, match=r"lacks the weights bert\.encoder\.layer\.1\.attention"):
        build_classifier(Pretrained(base_model=str(tmp_path)), build_tokenizer, LABELS, seed=0)


def test_a_model_that_is_no_classifier_in_transformers_is_refused(tmp_path: Path) -> None:
    hf.Blip2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_classifier(Pretrained(base_model=str(tmp_path)), build_tokenizer, LABELS, seed=0)
