import json
import re
import time
from pathlib import Path

import pytest
import torch
import transformers as hf
from pydantic import ValidationError
from safetensors.torch import save_file

from rlhf_exp.models.classifiers import load_classifier
from rlhf_exp.models.engines import ENGINES
from rlhf_exp.models.hub import locate_model
from rlhf_exp.models.loading import (
    VALUE_HEAD_FILE,
    Pretrained,
    build_policy,
    load_language_model,
    load_policy,
    load_tokenizer,
)
from rlhf_exp.models.model_checks import must_be_causal
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.tokenizers import word_tokenizer
from tests.builders import assert_near, build_tokenizer, ragged_tokens, stretch, tiny_policy

TOKENS, MASK = ragged_tokens()
CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here asks the network, wherever it runs."""
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def save(model: hf.PreTrainedModel, path: Path) -> str:
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("engine", ["fast", "hooked"])
def test_a_saved_policy_comes_back_bit_by_bit(architecture, engine, tmp_path):
    policy = tiny_policy(architecture, engine=engine)
    policy.tokenizer.padding_side = "right"
    save_policy(policy, tmp_path)
    loaded = load_policy(tmp_path, engine=engine, seed=99)
    assert type(loaded.engine) is ENGINES[engine]
    assert type(loaded.language_model) is type(policy.language_model)
    for ours, theirs in zip(policy(TOKENS, MASK), loaded(TOKENS, MASK), strict=True):
        assert torch.equal(ours, theirs)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.language_model.training
    assert loaded.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert loaded.tokenizer.padding_side == "left"


def test_a_run_folder_is_as_good_as_its_model(tmp_path):
    policy = tiny_policy()
    save_policy(policy, tmp_path / "run" / "model")
    loaded = load_policy(str(tmp_path / "run"))
    for ours, theirs in zip(policy(TOKENS, MASK), loaded(TOKENS, MASK), strict=True):
        assert torch.equal(ours, theirs)
    assert locate_model(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    assert locate_model(str(tmp_path / "run" / "model")) == str(tmp_path / "run" / "model")
    # Of a directory with both, the one that was named.
    save_policy(policy, tmp_path / "run")
    assert locate_model(str(tmp_path / "run")) == str(tmp_path / "run")


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    save_policy(tiny_policy(), tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/model") == str(tmp_path / "model")


def test_a_directory_is_found_from_every_folder(tmp_path, monkeypatch):
    save_policy(tiny_policy(), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert locate_model("model") == str(tmp_path / "model")


def test_without_a_saved_head_one_is_drawn_by_the_seed(tmp_path):
    policy = tiny_policy()
    save_policy(policy, tmp_path)
    (tmp_path / VALUE_HEAD_FILE).unlink()
    first, again, other = (load_policy(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first(TOKENS, MASK)[0], policy(TOKENS, MASK)[0])
    assert torch.equal(first(TOKENS, MASK)[1], again(TOKENS, MASK)[1])
    assert not torch.equal(first(TOKENS, MASK)[1], other(TOKENS, MASK)[1])


def test_a_head_that_is_not_saved_can_start_at_zero(tmp_path):
    save_policy(tiny_policy(), tmp_path)
    settings = Pretrained(base_model=str(tmp_path), value_head_init="zero")
    saved = build_policy(settings, None, device=CPU, seed=0)
    assert saved(TOKENS, MASK)[1].abs().max() > 0.1  # the saved one goes before
    (tmp_path / VALUE_HEAD_FILE).unlink()
    drawn = build_policy(settings, None, device=CPU, seed=0)
    assert not drawn(TOKENS, MASK)[1].any()


@pytest.mark.parametrize(("init", "zero"), [("default", False), ("zero", True)])
def test_a_model_from_nothing_gets_the_head_that_is_asked_for(init, zero):
    settings = Scratch(d_model=16, num_heads=2, value_head_init=init)
    policy, again = (build_policy(settings, build_tokenizer, device=CPU, seed=3) for _ in range(2))
    values = policy(TOKENS, MASK)[1]
    assert bool(values.any()) != zero
    assert torch.equal(again(TOKENS, MASK)[1], values)


def test_the_settings_choose_the_engine(tmp_path):
    path = str(save_policy(tiny_policy(), tmp_path))
    for engine in ("fast", "hooked"):
        for settings in (Pretrained(base_model=path, engine=engine), Scratch(engine=engine)):
            policy = build_policy(settings, build_tokenizer, device=CPU, seed=0)
            assert type(policy.engine) is ENGINES[engine]


def test_half_precision_weights_are_loaded_as_fp32(tmp_path):
    save_policy(tiny_policy(), tmp_path)
    hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(
        tmp_path
    )
    model, _ = load_language_model(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_weights_of_the_trunk_alone_do_where_the_embeddings_are_tied(tmp_path):
    policy = tiny_policy("gpt2")
    loaded, _ = load_language_model(save(policy.language_model.transformer, tmp_path))
    assert torch.equal(loaded.lm_head.weight, policy.language_model.lm_head.weight)


@pytest.mark.parametrize(
    "config", [hf.Qwen2Config(**SHAPE), hf.MistralConfig(**SHAPE)], ids=lambda c: c.model_type
)
def test_other_architectures_run_on_both_engines(config, tmp_path):
    path = save(hf.AutoModelForCausalLM.from_config(config), tmp_path)
    fast, hooked = (load_policy(path, engine=engine)(TOKENS, MASK) for engine in ("fast", "hooked"))
    for one, other in zip(fast, hooked, strict=True):
        assert_near(one[MASK], other[MASK])


@pytest.mark.parametrize(
    "load", [load_policy, load_language_model, load_tokenizer], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", ["./missing", "/missing", "~/missing", "outputs/missing/run"])
def test_a_path_that_does_not_exist_is_refused(load, name):
    with pytest.raises(ConfigError, match=rf"model\.base_model='{name}': no such directory"):
        load(name)


def test_a_directory_without_a_model_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    expected = r"is a directory without a model: neither config\.json nor model/config\.json"
    with pytest.raises(ConfigError, match=expected):
        load_policy(tmp_path)
    with pytest.raises(ConfigError, match=rf"reward\.name=.*{expected}"):
        load_classifier(str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("name", ["gpt2-that-nobody-made", "nobody/nothing"])
def test_a_hub_name_without_a_network_is_refused_at_once(name):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=rf"model\.base_model='{name}' cannot be loaded: .*reach"):
        load_policy(name)
    assert time.monotonic() - start < 5


def test_weights_that_are_gone_or_cut_off_are_refused(tmp_path):
    save_policy(tiny_policy(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cannot be loaded[\s\S]*incomplete"):
        load_policy(tmp_path)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"cannot be loaded[\s\S]*no file named model.safetens"):
        load_policy(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    save_policy(tiny_policy("gpt2"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 32}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_policy(tmp_path)


def test_an_encoder_is_not_a_language_model(tmp_path):
    shape = {"vocab_size": 16, "dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 1}
    distilbert = save(hf.DistilBertModel(hf.DistilBertConfig(**shape)), tmp_path / "distilbert")
    with pytest.raises(
        ConfigError, match=r"is an encoder \(distilbert\) and cannot continue a text"
    ):
        load_policy(distilbert)
    message = re.escape(f"model.base_model={distilbert!r} is an encoder (distilbert) and cannot")
    [problem] = must_be_causal(Pretrained(base_model=distilbert))
    assert re.match(message, problem)
    assert must_be_causal(Pretrained(base_model="some/encoder-on-the-hub")) == []
    # transformers opens this one as a language model.
    shape = {name: SHAPE[name] for name in SHAPE if name not in ("num_key_value_heads", "head_dim")}
    bert = save(hf.BertForMaskedLM(hf.BertConfig(**shape)), tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"is an encoder \(bert\) and cannot continue a text"):
        load_policy(bert)


@pytest.mark.parametrize(
    "config",
    [
        hf.Gemma2Config(final_logit_softcapping=30.0, **SHAPE),
        hf.CohereConfig(logit_scale=0.0625, **{k: v for k, v in SHAPE.items() if k != "head_dim"}),
        hf.GraniteConfig(logits_scaling=8.0, **SHAPE),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scaled_and_capped_logits_are_the_models_own(config, dtype, tmp_path):
    model = hf.AutoModelForCausalLM.from_config(config)
    stretch(model, seed=0)
    loaded = Pretrained(base_model=save(model, tmp_path), dtype=dtype)
    policy = build_policy(loaded, None, device=CPU, seed=0)
    expected = policy.language_model(input_ids=TOKENS[:1]).logits.float()
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    assert_near(policy(TOKENS[:1])[0], expected, tolerance=tolerance)


@pytest.mark.parametrize("cls", [hf.LlamaModel, hf.LlamaForSequenceClassification])
def test_a_model_without_its_unembedding_is_refused(cls, tmp_path):
    with pytest.raises(ConfigError, match=r"as LlamaForCausalLM: it lacks .* lm_head\.weight"):
        load_policy(save(cls(hf.LlamaConfig(**SHAPE)), tmp_path))


def test_a_language_model_is_not_a_classifier(tmp_path):
    save_policy(tiny_policy("gpt2"), tmp_path)
    lacks = r"reward\.name=.*GPT2ForSequenceClassification: it lacks .* score\.weight"
    with pytest.raises(ConfigError, match=lacks):
        load_classifier(str(tmp_path), dtype=torch.float32)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    save_policy(tiny_policy(), tmp_path)
    word_tokenizer(map(str, range(30))).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer has 34 tokens but the model only 16"):
        load_policy(tmp_path)


@pytest.mark.parametrize("without", ["gpt2", "gpt_neox"])
def test_a_model_without_a_tokenizer_is_refused(without, tmp_path):
    save_policy(tiny_policy(without), tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer; save the tokenizer"):
        load_policy(tmp_path)
    with pytest.raises(ConfigError, match=r"^reward\.path=.* holds no tokenizer; save the token"):
        load_tokenizer(str(tmp_path), field="reward.path")


def test_a_tokenizer_is_loaded_by_itself_and_pads_on_the_left(tmp_path):
    policy = tiny_policy()
    policy.tokenizer.padding_side = "right"
    save_policy(policy, tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert tokenizer(["one two", "two"], padding=True)["input_ids"] == [[5, 6], [0, 6]]
    with pytest.raises(ConfigError, match=r"^reward\.path='/missing': no such directory"):
        load_tokenizer("/missing", field="reward.path")


@pytest.mark.parametrize("broken", ["cut off", "another shape"])
def test_a_value_head_of_another_model_is_refused(broken, tmp_path):
    save_policy(tiny_policy(), tmp_path)
    path = tmp_path / VALUE_HEAD_FILE
    if broken == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        save_file({"0.weight": torch.zeros(8, 2)}, path)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))} is not a value head of this"):
        load_policy(tmp_path)


def test_settings_are_checked():
    with pytest.raises(ValidationError, match="at least 1 character"):
        Pretrained(base_model="")
    with pytest.raises(ValidationError, match="'fast' or 'hooked'"):
        Pretrained(base_model="gpt2", engine="slow")


def test_fingerprint_follows_the_files_of_a_directory(tmp_path: Path) -> None:
    model = Pretrained(base_model=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("a")
    first = model.fingerprint()
    assert first == model.fingerprint() != ""
    (tmp_path / "model.safetensors").write_text("ab")
    assert model.fingerprint() != first
    assert Pretrained(base_model="gpt2").fingerprint() == ""
    assert Pretrained(base_model="artifact:base").fingerprint() == ""


def test_a_revision_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.revision=main is for hub names"):
        load_language_model(str(tmp_path), revision="main")
