import pytest
import torch
import transformers as hf

from rlhf_exp.rewards.pair_model import PairModel
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Completions
from tests.builders import completions
from tests.rewards.checkpoints import (
    BOS,
    CHAT_TEMPLATE,
    CONTEXT_LEN,
    DECODERS,
    EOS,
    chats,
    direct_logits,
    logits_at,
    look_up,
    save_classifier,
)

CPU = torch.device("cpu")
BEFORE = ["one two", "three", "four five six", "no ."]
AFTER = [" three four", " one", "", " seven eight nine zero . no"]


def score(path: str, record: Completions, **settings: object) -> torch.Tensor:
    return PairModel(name=path, **settings).load(CPU)(record)


def assert_equal(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("architecture", DECODERS)
def test_eos_is_behind_every_text_whether_the_completion_ended_or_was_cut(
    architecture, pad_is_eos, tmp_path
):
    path = save_classifier(tmp_path, architecture, pad_is_eos=pad_is_eos, padding_side="left")
    rows = [[*look_up(path, a + b), EOS] for a, b in zip(BEFORE, AFTER, strict=True)]
    # Where EOS is the padding as well, the model reads before it, as it did while it was trained.
    last = -2 if pad_is_eos else -1
    expected = torch.cat([logits_at(path, row, last) for row in rows])[:, 0]
    assert_equal(direct_logits(path, rows)[:, 0], expected)
    assert torch.pdist(expected[:, None]).min() > 1e-4
    for batch_size in (1, 3, 64):
        ours = score(path, completions(AFTER, before=BEFORE), batch_size=batch_size)
        assert ours.shape == (4,)
        assert ours.dtype == torch.float32
        assert_equal(ours, expected)


def test_a_completion_that_spells_eos_out_gets_no_second_one(tmp_path):
    path = save_classifier(tmp_path, "llama")
    record = completions([" two<eos>", " two"], before=["one", "one"])
    expected = direct_logits(path, [[*look_up(path, "one two"), EOS]])[:, 0]
    assert_equal(score(path, record), expected.repeat(2))


def test_the_tokenizers_own_special_tokens_are_added(tmp_path):
    path = save_classifier(tmp_path, "llama", frame="<bos> $A <eos>")
    expected = direct_logits(path, [[BOS, *look_up(path, "one two"), EOS, EOS]])[:, 0]
    assert_equal(score(path, completions([" two"], before=["one"])), expected)


def test_a_tokenizer_without_eos_adds_what_it_adds(tmp_path):
    path = save_classifier(tmp_path, "bert", frame="<bos> $A <eos>")
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    assert hf.AutoTokenizer.from_pretrained(path).eos_token is None
    expected = direct_logits(path, [[BOS, *look_up(path, "one two"), EOS]])[:, 0]
    assert_equal(score(path, completions([" two"], before=["one"])), expected)


def test_a_conversation_is_what_its_template_makes_of_it_and_no_more(tmp_path):
    path = save_classifier(tmp_path, "qwen2", chat_template=CHAT_TEMPLATE.replace("}} {{", "}}{{"))
    talk = [{"role": "one", "content": " two"}]
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    # As RewardTrainer's `_tokenize` does.
    whole = [*talk, {"role": "assistant", "content": " six seven"}]
    row = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]
    assert row[:3] == [BOS, *look_up(path, "one two")]
    assert row[-3:] == [*look_up(path, "one six seven")[1:], EOS]
    ours = score(path, chats([talk], [" six seven"]))
    assert_equal(ours, direct_logits(path, [row])[:, 0])


def test_a_conversation_without_a_template_is_a_text_that_ends(tmp_path):
    path = save_classifier(tmp_path, "llama")
    record = chats([[{"role": "one", "content": "two"}]], [" six"])
    expected = direct_logits(path, [[*look_up(path, "no no six"), EOS]])[:, 0]
    assert_equal(score(path, record), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_completion_is_what_is_kept_of_a_long_text(side, tmp_path):
    path = save_classifier(tmp_path, "gpt2")
    before, after = "one two three four five " * 4, "six seven eight nine"
    row = [*look_up(path, before + after), EOS]
    kept = row[-CONTEXT_LEN:] if side == "left" else row[:CONTEXT_LEN]
    chosen = {} if side == "left" else {"truncation_side": side}
    ours = score(path, completions([after], before=[before]), **chosen)
    assert_equal(ours, direct_logits(path, [kept])[:, 0])


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_classifier_is_for_the_other_reward(num_labels, tmp_path):
    path = save_classifier(tmp_path, "llama", num_labels=num_labels)
    expected = rf"has {num_labels} outputs, a reward model one; .* is reward=classifier"
    with pytest.raises(ConfigError, match=expected):
        PairModel(name=path).load(CPU)


def test_a_language_model_without_the_head_is_refused(tmp_path):
    path = save_classifier(tmp_path, "llama")
    hf.AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)
    with pytest.raises(ConfigError, match=r"it lacks the weights score\.weight"):
        PairModel(name=path).load(CPU)


def test_scores_are_where_the_policy_is(tmp_path):
    path = save_classifier(tmp_path, "gpt2")
    function = PairModel(name=path, device="cpu").load(torch.device("meta"))
    assert function(completions(AFTER)).device.type == "meta"


@pytest.mark.gpu
def test_auto_is_bf16_on_cuda(tmp_path):
    path = save_classifier(tmp_path, "llama")
    cuda = torch.device("cuda")
    ours = PairModel(name=path).load(cuda)(completions(AFTER, before=BEFORE))
    half = PairModel(name=path, dtype="bf16").load(cuda)(completions(AFTER, before=BEFORE))
    assert (ours.dtype, ours.device.type) == (torch.float32, "cuda")
    assert torch.equal(ours, half)
