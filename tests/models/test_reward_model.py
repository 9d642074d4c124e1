"""The reward model: features that padding and neighbours do not reach, heads as loops say, and
files that give the same scores again."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from rlhf_exp.models.reward_model import (
    HEAD_FILE,
    SHAPE_FILE,
    HeadShape,
    LastTokenHead,
    RewardFeatures,
    RewardModel,
    TokenSumHead,
    load_reward_model,
    read_head_shape,
    save_reward_model,
)
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Completions, PromptBatch
from tests.builders import (
    ARCHITECTURES,
    WORDS,
    assert_near,
    build_tokenizer,
    plain_forward,
    ragged_tokens,
    stretch,
    tiny_policy,
)

EOS = 2
KINDS = ("token_sum", "last_token")
# Lengths with EOS; the third and the last did not end.
LENGTHS, ENDED = (4, 1, 5, 2, 3), (True, True, False, True, False)


def shape(kind: str = "token_sum", *, read_layers: int = 2, prepend_bos: bool = False) -> HeadShape:
    return HeadShape(kind=kind, width=6, read_layers=read_layers, prepend_bos=prepend_bos)


def tiny_reward_model(architecture: str = "gpt2", kind: str = "token_sum", *, read_layers: int = 2):
    """On a backbone and with a head whose weights are far from their small initial ones."""
    policy = tiny_policy(architecture)
    backbone = CausalTransformer(policy.language_model, policy.tokenizer)
    model = RewardModel(backbone, shape(kind, read_layers=read_layers))
    model.initialise_head(torch.Generator().manual_seed(0), bias=0.0)
    stretch(model.head, seed=1)
    return model


def ragged_completions(seed: int = 0) -> Completions:
    """Prompts with padding on the left and completions with padding on the right."""
    tokens, mask = ragged_tokens(batch=len(LENGTHS), seq=6, seed=seed)
    answers, _ = ragged_tokens(batch=len(LENGTHS), seq=2 * max(LENGTHS), seed=seed + 1)
    answers = answers[:, -max(LENGTHS) :].clone()
    lengths = torch.tensor(LENGTHS)[:, None]
    for row, (length, ended) in enumerate(zip(LENGTHS, ENDED, strict=True)):
        if ended:
            answers[row, length - 1] = EOS
    answer_mask = torch.arange(max(LENGTHS)) < lengths
    return Completions(
        prompts=PromptBatch(tokens=tokens, mask=mask, rows=tuple({"prompt": ""} for _ in LENGTHS)),
        tokens=answers * answer_mask,
        mask=answer_mask,
        texts=("",) * len(LENGTHS),
    )


def padded(batch: Completions, left: int, right: int, *, fill: int = 0) -> Completions:
    """Further padding on either side, and `fill` in all of it."""

    def pad(tokens: Tensor, mask: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
        tokens, mask = (nn.functional.pad(x, sides) for x in (tokens, mask))
        return torch.where(mask, tokens, fill), mask

    prompt, prompt_mask = pad(batch.prompts.tokens, batch.prompts.mask, (left, 0))
    tokens, mask = pad(batch.tokens, batch.mask, (0, right))
    prompts = PromptBatch(tokens=prompt, mask=prompt_mask, rows=batch.prompts.rows)
    return Completions(prompts=prompts, tokens=tokens, mask=mask, texts=batch.texts)


def real(batch: Completions, row: int) -> tuple[Tensor, Tensor]:
    """Prompt and completion of a row without padding."""
    prompts = batch.prompts
    return prompts.tokens[row][prompts.mask[row]], batch.tokens[row][batch.mask[row]]


@pytest.mark.parametrize("read_layers", [1, 2])
def test_features_are_states_and_logprobs_of_each_sequence_by_itself(architecture, read_layers):
    model = tiny_reward_model(architecture, read_layers=read_layers)
    batch = ragged_completions()
    features = model.features(batch)
    network = model.backbone.language_model
    for row, (length, ended) in enumerate(zip(LENGTHS, ENDED, strict=True)):
        prompt, answer = real(batch, row)
        sequence = torch.cat([prompt, answer])[None]
        with torch.no_grad():
            output = network(input_ids=sequence, output_hidden_states=True)
        start = len(prompt)
        states = [layer[0, start - 1 :] for layer in output.hidden_states[-read_layers:]]
        assert_near(features.states[row, : length + 1], torch.cat(states, dim=-1))
        logprobs = output.logits[0].double().log_softmax(dim=-1)
        for i, token in enumerate(answer.tolist()):
            expected = logprobs[start + i - 1, token].item()
            assert features.logprobs[row, i].item() == pytest.approx(expected, abs=1e-4)
        assert features.last[row] == length - ended
        assert not features.states[row, length + 1 :].any()
        assert not features.logprobs[row, length:].any()
    assert features.states.shape == (5, 6, 16 * read_layers)
    assert features.states.dtype == features.logprobs.dtype == torch.float32
    assert torch.equal(features.mask, batch.mask)


def test_a_sampling_temperature_is_not_the_reward_models():
    # logprobs are the policy's own, as `token_logprobs` of its whole forward has them.
    policy = tiny_policy()
    model = RewardModel(CausalTransformer(policy.language_model, policy.tokenizer), shape())
    batch = ragged_completions()
    logits, _, _ = plain_forward(policy, *batch.sequences)
    logprobs = logits.log_softmax(dim=-1)[:, 5:-1].gather(-1, batch.tokens[..., None])[..., 0]
    assert_near(model.features(batch).logprobs[batch.mask], logprobs[batch.mask])


BACKBONE = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        hf.GraniteConfig(**BACKBONE, logits_scaling=8.0),
        hf.CohereConfig(**BACKBONE, logit_scale=0.0625),
        hf.Gemma2Config(**BACKBONE, head_dim=8, final_logit_softcapping=2.0),
    ],
    ids=lambda config: config.model_type,
)
def test_a_scale_and_a_soft_cap_reach_the_logprobs(config):
    torch.manual_seed(0)
    network = hf.AutoModelForCausalLM.from_config(config).eval()
    stretch(network, seed=0)
    model = RewardModel(CausalTransformer(network, build_tokenizer()), shape())
    batch = ragged_completions()
    features = model.features(batch)
    for row, length in enumerate(LENGTHS):
        prompt, answer = real(batch, row)
        logits = network(input_ids=torch.cat([prompt, answer])[None]).logits[0]
        logprobs = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(-1, answer[:, None])[:, 0]
        assert_near(features.logprobs[row, :length], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_not_rounded_under_autocast(architecture):
    # Logits around -100, where bf16 has steps of one half.
    model = tiny_reward_model(architecture)
    embedding = model.backbone.language_model.get_output_embeddings()
    embedding.bias = nn.Parameter(torch.linspace(-110, -90, 16))
    batch = ragged_completions()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.features(batch)
        hidden = model.backbone.last_layers(*batch.sequences, 1)[-1].float()
    logits = hidden @ embedding.weight.T + embedding.bias
    logprobs = logits.log_softmax(dim=-1)[:, 5:-1].gather(-1, batch.tokens[..., None])[..., 0]
    assert_near(features.logprobs[batch.mask], logprobs[batch.mask])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right", "fill"), [(4, 0, 0), (0, 3, 0), (2, 5, 7)])
def test_padding_and_what_it_holds_changes_no_score(architecture, kind, left, right, fill):
    model = tiny_reward_model(architecture, kind)
    batch = ragged_completions()
    scores = model(batch)
    assert scores.std() > 0.05
    assert_near(model(padded(batch, left, right, fill=fill)), scores)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(architecture, kind):
    model = tiny_reward_model(architecture, kind)
    batch = ragged_completions()
    scores = model(batch)
    assert scores.shape == (5,)
    for order in ([3], [4, 1], [2, 0, 3, 1, 4]):
        assert_near(model(batch[torch.tensor(order)]), scores[order])


def random_features(*, d_model: int = 5) -> RewardFeatures:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 0])[:, None]
    real = torch.cat([torch.ones(4, 1, dtype=torch.bool), mask], dim=1)[..., None]
    return RewardFeatures(
        states=torch.randn(4, 5, d_model, generator=generator, dtype=torch.float64) * real,
        logprobs=-torch.rand(4, 4, generator=generator, dtype=torch.float64) * 3 * mask,
        mask=mask,
        last=torch.tensor([3, 0, 3, 0]),
    )


def drawn_anew(head: nn.Module) -> nn.Module:
    """The head with standard normal weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    return head


def linear(layer: nn.Linear, x: list[float]) -> list[float]:
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        math.fsum(w * value for w, value in zip(row, x, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]


def gelu(x: list[float]) -> list[float]:
    return [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x]


def test_the_token_sum_head_is_a_loop_over_the_tokens():
    features = random_features()
    head = drawn_anew(TokenSumHead(5, 3).double())
    first, _, second, _, third = head.token
    expected = []
    for row, length in enumerate((4, 1, 3, 0)):
        total, summed = [0.0] * 3, 0.0
        for t in range(length):
            before, after = features.states[row, t].tolist(), features.states[row, t + 1].tolist()
            described = [*before, *after, features.logprobs[row, t].item()]
            vector = linear(third, gelu(linear(second, gelu(linear(first, described)))))
            total = [a + b for a, b in zip(total, vector, strict=True)]
            summed += features.logprobs[row, t].item()
        expected.append(linear(head.score, gelu(linear(head.out[0], [*total, summed])))[0])
    assert head(features).tolist() == pytest.approx(expected, abs=1e-12)
    assert head.condense(features) is features
    assert max(expected) - min(expected) > 0.1


def test_the_last_token_head_reads_the_state_before_eos():
    features = random_features()
    head = drawn_anew(LastTokenHead(5, 3).double())
    norm, inner, _ = head.out
    expected = []
    for row, last in enumerate((3, 0, 3, 0)):
        state = features.states[row, last].tolist()
        mean = math.fsum(state) / 5
        variance = math.fsum((x - mean) ** 2 for x in state) / 5
        scaled = [
            (x - mean) / math.sqrt(variance + 1e-5) * w + b
            for x, w, b in zip(state, norm.weight.tolist(), norm.bias.tolist(), strict=True)
        ]
        hidden = [max(0.0, x) for x in linear(inner, scaled)]
        expected.append(linear(head.score, hidden)[0])
    assert head(features).tolist() == pytest.approx(expected, abs=1e-12)
    assert max(expected) - min(expected) > 0.1
    condensed = head.condense(features)
    assert condensed.states.shape == (4, 1, 5)
    assert torch.equal(head(condensed), head(features))
    index = torch.tensor([2, 1])
    assert torch.equal(head(condensed[index]), head(features)[index])


def test_what_follows_the_last_word_does_not_reach_the_last_token_head():
    model = tiny_reward_model(kind="last_token")
    batch = ragged_completions()
    tokens = batch.tokens.clone()
    # The first row ends with EOS, which is not read; its last word is.
    tokens[0, 3] = 0
    cut = Completions(
        prompts=batch.prompts, tokens=tokens, texts=batch.texts,
        mask=batch.mask & ~((batch.tokens == EOS) & (torch.arange(5) == 3)),
    )  # fmt: skip
    assert_near(model(cut), model(batch))
    tokens[0, 2] = 4 + (tokens[0, 2] - 3) % len(WORDS)
    assert (model(cut) - model(batch))[0].abs() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read_layers", [1, 2])
def test_a_saved_reward_model_gives_bit_equal_scores(architecture, kind, read_layers, tmp_path):
    model = tiny_reward_model(architecture, kind, read_layers=read_layers)
    batch = ragged_completions()
    assert save_reward_model(model, tmp_path / "run" / "model") == tmp_path / "run" / "model"
    for path in (tmp_path / "run", str(tmp_path / "run" / "model")):
        loaded = load_reward_model(path)
        assert torch.equal(loaded(batch), model(batch))
        assert loaded.shape == model.shape
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.backbone.tokenizer.get_vocab() == model.backbone.tokenizer.get_vocab()


def test_the_shape_of_a_saved_head_is_read_without_the_model(tmp_path):
    model = tiny_reward_model()
    model.shape = shape("token_sum", prepend_bos=True)
    save_reward_model(model, tmp_path)
    assert read_head_shape(tmp_path) == shape("token_sum", prepend_bos=True)
    assert json.loads((tmp_path / SHAPE_FILE).read_text()) == {
        "kind": "token_sum", "width": 6, "read_layers": 2, "prepend_bos": True
    }  # fmt: skip


@pytest.mark.parametrize("contents", [None, "{", "[]", "{}", '{"kind": "token_sum", "size": 3}'])
def test_a_directory_without_a_head_is_refused(contents, tmp_path):
    save_policy(tiny_policy(), tmp_path)
    if contents is not None:
        (tmp_path / SHAPE_FILE).write_text(contents)
    expected = r"^reward\.path='.*' holds no reward model \(reward_head\.json\): name the folder of"
    with pytest.raises(ConfigError, match=expected):
        load_reward_model(tmp_path)


@pytest.mark.parametrize("broken", ["gone", "cut off", "another shape"])
def test_a_head_of_another_model_is_refused(broken, tmp_path):
    save_reward_model(tiny_reward_model(), tmp_path)
    file = tmp_path / HEAD_FILE
    if broken == "gone":
        file.unlink()
    elif broken == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (tmp_path / SHAPE_FILE).write_text(json.dumps(vars(shape("last_token"))))
    expected = r"^reward\.path: .*reward_head\.safetensors is not the head of this model"
    with pytest.raises(ConfigError, match=expected):
        load_reward_model(tmp_path)


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^reward\.path=.*is a directory without a model"):
        load_reward_model(tmp_path)
    with pytest.raises(ConfigError, match=r"^reward\.path='/missing': no such directory"):
        load_reward_model("/missing")


def test_more_layers_than_there_are_blocks_are_refused():
    policy = tiny_policy()
    with pytest.raises(ValueError, match="the model has 2 blocks, fewer than read_layers"):
        RewardModel(policy, shape(read_layers=3))
    model = tiny_reward_model()
    with pytest.raises(ValueError, match="the model has 2 blocks, fewer than unfreeze_layers"):
        model.unfreeze(3)


BLOCKS = {
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "qwen2": "model.layers",
    "gpt_neox": "gpt_neox.layers",
}
NORMS = {
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "qwen2": "model.norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
}


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_unfreezing_trains_the_last_blocks_and_the_final_norm_alone(architecture, num_layers):
    model = tiny_reward_model(architecture)
    model.backbone.requires_grad_(True)
    if num_layers:
        model.unfreeze(2)  # what was unfrozen before is frozen again
    model.unfreeze(num_layers)
    blocks = [f"{BLOCKS[architecture]}.{i}." for i in range(2 - num_layers, 2)]
    prefixes = (*blocks, f"{NORMS[architecture]}.") if num_layers else ()
    network = model.backbone.language_model
    expected = {name for name, _ in network.named_parameters() if name.startswith(prefixes)}
    assert bool(expected) == bool(num_layers)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == expected
    assert all(parameter.requires_grad for parameter in model.head.parameters())
    # And the gradient reaches every one of them.
    model(ragged_completions()).square().sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == expected


def test_the_language_model_stays_in_evaluation_mode():
    policy = tiny_policy(dropout=0.5)
    model = RewardModel(CausalTransformer(policy.language_model, policy.tokenizer), shape())
    batch = ragged_completions()
    model.train()
    assert model.head.training
    assert torch.equal(model(batch), model(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_drawn_by_the_generator_around_its_bias(kind):
    model = tiny_reward_model(kind=kind)

    def drawn(seed: int, bias: float) -> dict[str, Tensor]:
        before = torch.get_rng_state()
        model.initialise_head(torch.Generator().manual_seed(seed), bias=bias)
        assert torch.equal(torch.get_rng_state(), before)
        return copy.deepcopy(model.head.state_dict())

    backbone = copy.deepcopy(model.backbone.state_dict())
    first, again, other = drawn(1, 4.5), drawn(1, 4.5), drawn(2, 4.5)
    assert first["score.bias"].tolist() == [4.5]
    for name, weights in first.items():
        assert torch.equal(weights, again[name])
    # Uniform within 1/sqrt(inputs).
    for name, module in model.head.named_modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            assert 0.5 * bound < first[f"{name}.weight"].abs().max() <= bound
            assert not torch.equal(first[f"{name}.weight"], other[f"{name}.weight"])
            if name != "score":
                assert not torch.equal(first[f"{name}.bias"], other[f"{name}.bias"])
    assert all(torch.equal(w, backbone[n]) for n, w in model.backbone.state_dict().items())


def test_a_shift_adds_to_every_score():
    model = tiny_reward_model()
    batch = ragged_completions()
    scores = model(batch).detach()
    model.shift(-2.5)
    torch.testing.assert_close(model(batch).detach(), scores - 2.5)
    model.shift(1.0)
    torch.testing.assert_close(model(batch).detach(), scores - 1.5)


def test_a_saved_reward_model_is_a_language_model_to_other_tools(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_reward_model()
    save_reward_model(model, tmp_path)
    network = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens, mask = ragged_completions().sequences
    ours = model.backbone.language_model(input_ids=tokens, attention_mask=mask.long()).logits
    theirs = network(input_ids=tokens, attention_mask=mask.long()).logits
    assert_near(theirs[mask], ours[mask], tolerance=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == (
        model.backbone.tokenizer.get_vocab()
    )
