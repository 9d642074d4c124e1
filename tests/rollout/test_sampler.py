import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_exp.models.loading import build_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.sampler import Sampler, as_completions, kept_mass, through_first_eos
from rlhf_exp.tasks.tokenizers import byte_pair_tokenizer
from rlhf_exp.types import Generation, PromptBatch
from tests.builders import plain_forward, prompts, tiny_policy, with_engine
from tests.rollout.oracles import (
    RAGGED,
    SHARED,
    assert_empty_padding,
    assert_measured,
    chi_squared_p,
    filtered_probs,
)

SAMPLERS = (CachedSampler, BridgeSampler)
each_sampler = pytest.mark.parametrize("cls", SAMPLERS)


def sample(sampler: Sampler, policy, texts, *, seed: int = 0) -> Generation:
    return sampler(policy, prompts(policy, texts), torch.Generator().manual_seed(seed))


def tensors(generation: Generation) -> tuple[Tensor, ...]:
    completions = generation.completions
    return (
        completions.tokens, completions.mask, generation.logprobs, generation.values,
        generation.hidden, generation.kept_mass,
    )  # fmt: skip


@each_sampler
@pytest.mark.parametrize("texts", [SHARED, RAGGED], ids=["shared", "ragged"])
def test_what_is_reported_is_what_a_full_pass_gives(architecture, cls, texts):
    policy = tiny_policy(architecture)
    generation = sample(cls(gen_len=12, stop_at_eos=True, temperature=3.0), policy, texts * 2)
    lengths = generation.completions.mask.sum(dim=1).unique()
    assert len(lengths) > 2  # rows end at different steps,
    assert lengths.max() == 12  # and some not at all
    assert_measured(generation, policy, temperature=3.0)


@each_sampler
def test_the_engine_of_the_policy_does_not_matter(cls):
    policy = tiny_policy()
    fast, hooked = (
        sample(cls(gen_len=4), with_engine(policy, engine), RAGGED) for engine in ("fast", "hooked")
    )
    for one, other in zip(tensors(fast), tensors(hooked), strict=True):
        assert torch.equal(one, other)


# Rows of two prompts in turn, one of them padded; then rows that are all the same.
MANY = {"ragged": ("one two three", "four") * 2000, "shared": ("five",) * 2000}
FILTERS = [
    (CachedSampler, {}),
    (CachedSampler, {"temperature": 0.7, "top_k": 6, "top_p": 0.8}),
    (CachedSampler, {"temperature": 1.7, "top_p": 0.6}),
    (BridgeSampler, {"temperature": 0.7, "top_k": 4}),
    (BridgeSampler, {"temperature": 1.7, "top_p": 0.6}),
]


@pytest.mark.parametrize(("cls", "filters"), FILTERS)
@pytest.mark.parametrize("texts", MANY.values(), ids=MANY.keys())
def test_tokens_come_as_often_as_the_filtered_distribution_says(cls, filters, texts):
    policy = tiny_policy("llama")
    generation = sample(cls(gen_len=2, **filters), policy, texts, seed=100)
    tokens = generation.completions.tokens
    for row, text in enumerate(dict.fromkeys(texts)):
        sampled = [tuple(pair) for pair in tokens[row :: len(set(texts))].tolist()]
        expected = pair_probs(policy, text, filters)
        firsts: dict[int, float] = {}
        for (first, _), prob in expected.items():
            firsts[first] = firsts.get(first, 0.0) + prob
        assert chi_squared_p([first for first, _ in sampled], firsts) > 1e-3
        assert chi_squared_p(sampled, expected) > 1e-3


@torch.no_grad()
def pair_probs(policy, text: str, filters: dict[str, float]) -> dict[tuple[int, int], float]:
    """The probability of each two tokens after the text, each first one run by itself."""

    def following(*more: int) -> dict[int, float]:
        row = torch.tensor([[1, *policy.tokenizer(text)["input_ids"], *more]])
        logits = plain_forward(policy, row, torch.ones_like(row, dtype=torch.bool))[0]
        return filtered_probs(logits[0, -1], **filters)

    return {
        (first, second): prob * after
        for first, prob in following().items()
        for second, after in following(first).items()
    }


@each_sampler
@pytest.mark.parametrize("texts", [SHARED, RAGGED], ids=["shared", "ragged"])
def test_the_generator_alone_decides(cls, texts):
    drawn = []
    for seed in (1, 1, 2):
        policy = tiny_policy()  # anew, so that it is a bridge's first call each time
        torch.manual_seed(len(drawn))  # the global state differs, and neither matters nor changes
        before = torch.get_rng_state()
        drawn.append(sample(cls(gen_len=6), policy, texts, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(tensors(drawn[0]), tensors(drawn[1]), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(drawn[0].completions.tokens, drawn[2].completions.tokens)
    rows = {tuple(row) for row in drawn[0].completions.tokens.tolist()}
    assert len(rows) == len(texts)  # each row draws for itself


@each_sampler
def test_one_generator_goes_on(cls):
    policy = tiny_policy()
    generator = torch.Generator().manual_seed(1)
    batch = prompts(policy, SHARED)
    first, second = (cls(gen_len=6)(policy, batch, generator) for _ in range(2))
    assert not torch.equal(first.completions.tokens, second.completions.tokens)


@each_sampler
def test_completions_end_with_their_first_eos(cls):
    policy = tiny_policy()
    generation = sample(cls(gen_len=20, stop_at_eos=True, temperature=3.0), policy, RAGGED * 3)
    completions = generation.completions
    ended = 0
    for tokens, mask in zip(completions.tokens.tolist(), completions.mask.tolist(), strict=True):
        length = tokens.index(2) + 1 if 2 in tokens else 20
        ended += length < 20
        assert mask == [True] * length + [False] * (20 - length)
    assert 3 < ended < 18
    assert_empty_padding(generation)


@each_sampler
def test_without_stop_at_eos_nothing_ends(cls):
    policy = tiny_policy()
    completions = sample(cls(gen_len=20, temperature=3.0), policy, RAGGED * 3).completions
    assert (completions.tokens[:, :-1] == 2).any()
    assert completions.mask.all()
    after = completions.tokens[:, 1:][completions.tokens[:, :-1] == 2]
    assert (after != 0).any()


@each_sampler
def test_all_rows_may_end_at_the_first_token(cls):
    policy = tiny_policy("gpt2")
    with torch.no_grad():  # the final layer norm says EOS whatever comes in
        norm = policy.language_model.transformer.ln_f
        norm.weight.zero_()
        norm.bias.copy_(50 * policy.language_model.lm_head.weight[2])
    generation = sample(cls(gen_len=5, stop_at_eos=True), policy, RAGGED)
    completions = generation.completions
    assert completions.tokens.tolist() == [[2, 0, 0, 0, 0]] * 6
    assert completions.mask.tolist() == [[True, False, False, False, False]] * 6
    assert completions.texts == ("",) * 6
    assert generation.logprobs.shape == generation.values.shape == (6, 5)
    assert_measured(generation, policy)


@each_sampler
@pytest.mark.parametrize("gen_len", [1, 7])
def test_gen_len_is_the_number_of_columns(cls, gen_len):
    policy = tiny_policy()
    generation = sample(cls(gen_len=gen_len), policy, RAGGED)
    for tensor in tensors(generation):
        assert tensor.shape[:2] == (6, gen_len)
    assert generation.completions.mask.all()
    assert generation.completions.prompts.texts == RAGGED


@each_sampler
def test_the_context_can_be_filled(cls):
    policy = tiny_policy()
    batch = prompts(policy, RAGGED)
    generation = sample(cls(gen_len=policy.context_len - batch.tokens.shape[1]), policy, RAGGED)
    assert_measured(generation, policy)


@each_sampler
def test_a_single_prompt(cls):
    policy = tiny_policy()
    assert_measured(sample(cls(gen_len=5), policy, ["four"]), policy)


@each_sampler
@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 16}])
def test_kept_mass_is_the_policys_probability_of_what_may_be_sampled(cls, filters):
    policy = tiny_policy()
    generation = sample(
        cls(gen_len=8, temperature=1.5, stop_at_eos=True, **filters), policy, RAGGED
    )
    completions = generation.completions
    logits = plain_forward(policy, *completions.sequences)[0][:, completions.prompt_len - 1 : -1]
    for row, column in completions.mask.nonzero().tolist():
        here = logits[row, column]
        allowed = filtered_probs(here, temperature=1.5, **filters)
        everything = filtered_probs(here, temperature=1.5)
        expected = sum(everything[token] for token in allowed)
        assert generation.kept_mass[row, column].item() == pytest.approx(expected, abs=1e-5)
        assert completions.tokens[row, column].item() in allowed
    assert_empty_padding(generation)


@each_sampler
def test_without_a_filter_all_mass_is_kept(cls):
    policy = tiny_policy()
    generation = sample(cls(gen_len=8, temperature=2.0, stop_at_eos=True), policy, RAGGED)
    assert not generation.completions.mask.all()
    assert torch.equal(generation.kept_mass, generation.completions.mask.float())


@each_sampler
def test_what_is_sampled_can_be_trained_on(cls):
    policy = tiny_policy()
    generation = sample(cls(gen_len=4), policy, RAGGED)
    for tensor in tensors(generation):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
    policy(*generation.completions.sequences)[0].sum().backward()
    assert policy.training is False


@each_sampler
def test_stopping_at_an_eos_that_does_not_exist_is_refused(cls):
    policy = tiny_policy()
    policy.tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"stop_at_eos=true needs .* end-of-sequence token"):
        sample(cls(gen_len=2, stop_at_eos=True), policy, RAGGED)
    assert sample(cls(gen_len=2), policy, RAGGED).completions.mask.all()


@each_sampler
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gen_len": 0}, "greater than or equal to 1"),
        ({"gen_len": 2.5}, "integer"),
        ({"temperature": 0.0}, r"greater than or equal to 0\.001"),
        ({"temperature": float("inf")}, "finite"),
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"top_p": 0.0}, "greater than 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"num_beams": 4}, "num_beams"),
    ],
)
def test_settings_out_of_range_are_refused(cls, wrong, message):
    with pytest.raises(ValidationError, match=message):
        cls(**wrong)


@each_sampler
def test_the_full_distribution_is_that_without_temperature_and_filters(cls):
    sampler = cls(gen_len=7, temperature=0.5, top_k=3, stop_at_eos=True)
    assert sampler.truncates
    full = sampler.full_distribution
    assert full == cls(gen_len=7, stop_at_eos=True)
    assert not full.truncates
    assert cls(top_p=0.9).truncates
    assert cls(top_p=0.9).full_distribution == cls()


def test_kept_mass_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    filtered = torch.tensor([[3.0, -torch.inf, 1.0, -torch.inf], [1.0, 2.0, 3.0, 4.0]])
    assert kept_mass(probs.log(), filtered).tolist() == pytest.approx([0.625, 1.0])


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        ([5, 6, 7], [1, 1, 1]),
        ([9, 6, 7], [1, 0, 0]),
        ([5, 9, 7], [1, 1, 0]),
        ([5, 6, 9], [1, 1, 1]),
        ([9, 9, 9], [1, 0, 0]),
        ([5, 9, 9], [1, 1, 0]),
        ([9, 5, 9], [1, 0, 0]),
        ([0, 0, 9], [1, 1, 1]),
    ],
)
def test_through_first_eos(tokens, mask):
    other = [5, 9, 5]
    both = through_first_eos(torch.tensor([tokens, other]), 9)
    assert both.int().tolist() == [mask, [1, 1, 0]]
    assert through_first_eos(torch.tensor([tokens]), None).tolist() == [[True] * 3]


# A few letters of several bytes each, in a vocabulary that holds their bytes alone.
LETTERS = ["a dozen € or 日本語 · ok", "日 € 語 x"]


def byte_tokenizer() -> PreTrainedTokenizerBase:
    alphabet = len({byte for text in LETTERS for byte in text.encode()})
    return byte_pair_tokenizer(LETTERS, vocab_size=alphabet + 4)


def metaspace_tokenizer() -> PreTrainedTokenizerBase:
    """As Llama's: a word's token holds the space before it, and decoding drops the first one."""
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "▁the", "▁cat", "s", "▁sat"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def texts_of(tokenizer: PreTrainedTokenizerBase, before: list[int], after: list[int]) -> str:
    """The text that `as_completions` gives these tokens, a longer row beside them."""
    batch = PromptBatch(
        tokens=torch.tensor([before, before]),
        mask=torch.ones(2, len(before), dtype=torch.bool),
        rows=({"prompt": tokenizer.decode(before, skip_special_tokens=True)},) * 2,
    )
    policy = CausalTransformer(tiny_policy().language_model, tokenizer)
    tokens = torch.tensor([[*after, before[-1]], [*after, before[-1]]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, -1] = False
    record = as_completions(policy, batch, tokens, mask)
    assert record.tokens.tolist() == [[*after, 0], [*after, before[-1]]]
    return record.full_texts[0]


@pytest.mark.parametrize("text", LETTERS)
def test_texts_join_to_the_decoded_whole(text):
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) > len(text)  # letters are in pieces
    cuts = [cut for cut in range(1, len(tokens)) if "\ufffd" not in tokenizer.decode(tokens[:cut])]
    assert len(cuts) == len(text) - 1
    for cut in cuts:
        assert texts_of(tokenizer, tokens[:cut], tokens[cut:]) == text
        # A completion may end within a letter.
        until = tokenizer.decode(tokens[: cut + 1])
        assert texts_of(tokenizer, tokens[:cut], tokens[cut : cut + 1]) == until


def test_a_prompt_may_end_within_a_letter():
    tokenizer = byte_tokenizer()
    tokens = tokenizer("日 x")["input_ids"]
    assert len(tokens) == 5
    # Nothing joins the two halves of the letter; what follows it is whole.
    separate = tokenizer.decode(tokens[:2]) + tokenizer.decode(tokens[2:])
    assert separate.endswith("\ufffd x")
    assert texts_of(tokenizer, tokens[:2], tokens[2:]) == separate


def test_a_space_that_decoding_drops_at_the_start_is_kept():
    tokenizer = metaspace_tokenizer()
    the, cat, s, sat = 2, 3, 4, 5
    assert tokenizer.decode([cat, s]) == "cats"
    assert texts_of(tokenizer, [the], [cat, s, sat]) == "the cats sat"
    assert texts_of(tokenizer, [the, cat], [s, sat]) == "the cats sat"
    assert texts_of(tokenizer, [0], [the, cat]) == "the cat"


def test_special_tokens_are_left_out_of_the_texts():
    tokenizer = tiny_policy().tokenizer
    assert texts_of(tokenizer, [1, 5], [6, 2]) == "one two"
    assert texts_of(tokenizer, [1], [5, 6, 2]) == "one two"
    assert texts_of(tokenizer, [1, 5], [2]) == "one"
    assert texts_of(tokenizer, [5, 3], [6, 3, 7]) == "one two three"  # 3 is <unk>


@each_sampler
def test_sampled_texts_join_to_the_decoded_whole(cls):
    tokenizer = byte_tokenizer()
    policy = build_policy(
        Scratch(d_model=16, num_heads=2), lambda: tokenizer, device=torch.device("cpu"), seed=0
    )
    texts = ["日", "a dozen", "€ or", "·", "x "]
    completions = sample(cls(gen_len=12, stop_at_eos=True), policy, texts).completions
    assert completions.prompts.texts == tuple(texts)
    rows = zip(*completions.sequences, strict=True)
    assert list(completions.full_texts) == [
        tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=True) for tokens, mask in rows
    ]
    assert any("\ufffd" in text for text in completions.texts)  # strange bytes are among them
