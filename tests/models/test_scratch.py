import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from rlhf_exp.models.scratch import Scratch, ScratchClassifier
from rlhf_exp.settings import ConfigError
from tests.builders import WORDS, build_tokenizer, stretch

SMALL = {"num_layers": 3, "d_model": 24, "num_heads": 2, "context_len": 17}


def model_of(architecture: str, *, seed: int = 0, **shape: object):
    settings = Scratch(architecture=architecture, **(SMALL | shape))
    return settings.language_model(build_tokenizer, seed=seed)[0]


def test_the_model_has_the_shape_that_is_asked_for(architecture):
    tokenizer = build_tokenizer()
    model, given = Scratch(architecture=architecture, **SMALL).language_model(
        lambda: tokenizer, seed=0
    )
    assert given is tokenizer
    assert model.config.num_hidden_layers == 3
    assert model.config.hidden_size == 24
    assert model.config.num_attention_heads == 2
    assert model.config.max_position_embeddings == 17
    assert model.config.vocab_size == len(tokenizer) == 4 + len(WORDS)
    ids = (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
    assert ids == (0, 1, 2)
    mlp = (24, 96) if architecture == "gpt2" else (96, 24)
    assert sum(tuple(parameter.shape) == mlp for parameter in model.parameters()) >= 3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # The context is one that can be used whole.
    assert model(input_ids=torch.ones(1, 17, dtype=torch.long)).logits.shape == (1, 17, 16)


def test_the_seed_alone_draws_the_weights(architecture):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = model_of(architecture, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = model_of(architecture, seed=5), model_of(architecture, seed=6)
    weights = first.state_dict()
    assert all(torch.equal(weights[name], again.state_dict()[name]) for name in weights)
    assert any(not torch.equal(weights[name], other.state_dict()[name]) for name in weights)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_reaches_the_model(architecture, dropout):
    model = model_of(architecture, dropout=dropout).train()
    tokens = torch.arange(4, 12)[None]
    torch.manual_seed(0)
    first, second = model(input_ids=tokens).logits, model(input_ids=tokens).logits
    assert torch.equal(first, second) == (dropout == 0)
    kinds = {"attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout"}
    rates = [rate for kind, rate in model.config.to_dict().items() if kind in kinds]
    assert len(rates) == {"gpt2": 3, "llama": 1, "qwen2": 1, "gpt_neox": 2}[architecture]
    assert set(rates) == {dropout}


@pytest.mark.parametrize("tied", [None, True, False])
def test_embeddings_are_tied_as_asked_or_as_the_architecture_does(architecture, tied, tmp_path):
    asked = {} if tied is None else {"tie_embeddings": tied}
    model = model_of(architecture, **asked)
    expected = architecture == "gpt2" if tied is None else tied
    unembedding = model.get_output_embeddings().weight
    assert (unembedding is model.get_input_embeddings().weight) == expected
    # One that is tied is counted once, and comes back tied.
    names = {name for name, parameter in model.named_parameters() if parameter is unembedding}
    assert len(names) == 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    both = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (both[0] is both[1]) == expected
    assert torch.equal(both[0], unembedding)


def test_nothing_was_saved_with_it():
    assert Scratch().value_head_path() is None


def test_a_task_without_texts_is_refused():
    with pytest.raises(ConfigError, match=r"task with texts.*model\.base_model=DIRECTORY"):
        Scratch().language_model(None, seed=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_model": 65}, "d_model=65 must be a multiple of num_heads=4"),
        ({"architecture": "llama", "d_model": 12}, r"d_model/num_heads=3 must be even"),
        ({"architecture": "qwen2", "d_model": 12}, r"d_model/num_heads=3 must be even"),
        ({"architecture": "gpt_neox", "d_model": 8}, r"d_model/num_heads=2 must be at least 4"),
        ({"architecture": "bert"}, "'gpt2', 'llama', 'qwen2' or 'gpt_neox'"),
        ({"num_layers": 0}, "greater than or equal to 1"),
        ({"context_len": 0}, "greater than or equal to 1"),
        ({"dropout": 1.0}, "less than 1"),
        ({"dropout": -0.1}, "greater than or equal to 0"),
        ({"dropout": float("nan")}, "greater than or equal to 0"),
        ({"tie_embeddings": "some"}, "valid boolean"),
        ({"engine": "slow"}, "'fast' or 'hooked'"),
        ({"value_head_init": "ones"}, "'default' or 'zero'"),
        ({"n_layer": 2}, "n_layer"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        Scratch(**wrong)


@pytest.mark.parametrize(
    ("shape", "heads"), [({"d_model": 12}, 4), ({"d_model": 8}, 4), ({"d_model": 5}, 1)]
)
def test_gpt2_has_no_rotary_pairs_to_fill(shape, heads):
    model = model_of("gpt2", num_heads=heads, **shape)
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("rotary", "d_model", "heads"),
    [("llama", 4, 2), ("qwen2", 4, 2), ("gpt_neox", 8, 2), ("gpt_neox", 10, 2)],
)
def test_the_narrowest_heads_know_their_positions(rotary, d_model, heads):
    model = model_of(rotary, d_model=d_model, num_heads=heads).eval()
    stretch(model, seed=0)
    near, far = (
        model(input_ids=torch.tensor([[4, 5, 6]]), position_ids=torch.tensor([positions])).logits
        for positions in ((0, 1, 2), (0, 1, 9))
    )
    assert torch.equal(near[:, :2], far[:, :2])
    assert (near - far)[:, 2].abs().max() > 1e-3


def test_the_classifier_has_the_shape_and_labels_that_are_asked_for():
    settings = ScratchClassifier(num_layers=2, d_model=24, num_heads=3, context_len=9)
    model = settings.classifier(build_tokenizer(), ("neg", "neutral", "pos"), seed=0)
    assert model.config.num_hidden_layers == 2
    assert model.config.hidden_size == 24
    assert model.config.num_attention_heads == 3
    assert model.config.hidden_dim == 96
    assert model.config.max_position_embeddings == 9
    assert model.config.vocab_size == 4 + len(WORDS)
    assert model.config.pad_token_id == 0
    assert model.config.id2label == {0: "neg", 1: "neutral", 2: "pos"}
    assert model.config.label2id == {"neg": 0, "neutral": 1, "pos": 2}
    assert model(input_ids=torch.ones(5, 9, dtype=torch.long)).logits.shape == (5, 3)


def test_the_seed_alone_draws_the_classifier():
    before = torch.get_rng_state()
    first, again, other = (
        ScratchClassifier().classifier(build_tokenizer(), ("a", "b"), seed=seed).state_dict()
        for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize("where", ["dropout", "head_dropout"])
def test_the_classifiers_dropouts_reach_it(where):
    silent = {"dropout": 0.0, "head_dropout": 0.0}
    for rates, equal in ((silent, True), (silent | {where: 0.5}, False)):
        model = ScratchClassifier(**rates).classifier(build_tokenizer(), ("a", "b"), seed=0)
        tokens = torch.arange(4, 12)[None]
        torch.manual_seed(0)
        first, second = (model.train()(input_ids=tokens).logits for _ in range(2))
        assert torch.equal(first, second) == equal


def test_a_classifier_whose_heads_do_not_divide_is_refused():
    with pytest.raises(ValidationError, match="d_model=65 must be a multiple of num_heads=2"):
        ScratchClassifier(d_model=65)
