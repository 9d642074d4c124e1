"""A trained reward model as a reward: its own scores, and only for policies that it can read."""

import json

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.models.loading import directory_hash
from rlhf_exp.models.reward_model import (
    HeadShape,
    RewardModel,
    load_reward_model,
    save_reward_model,
)
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.rewards.protocol import ReadsTokens, Reward
from rlhf_exp.rewards.reward_model import LearnedReward, score_answers
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.pair_tokens import encode_completions
from rlhf_exp.tasks.tokenizers import word_tokenizer
from rlhf_exp.types import Completions, PromptBatch
from tests.builders import (
    CONTEXT_LEN,
    WORDS,
    assert_near,
    build_tokenizer,
    ragged_tokens,
    stretch,
    tiny_policy,
)

CPU = torch.device("cpu")
ROWS = 7


def reward_model(*, prepend_bos: bool = True) -> RewardModel:
    policy = tiny_policy()
    shape = HeadShape(kind="token_sum", width=8, read_layers=2, prepend_bos=prepend_bos)
    model = RewardModel(CausalTransformer(policy.language_model, policy.tokenizer), shape)
    model.initialise_head(torch.Generator().manual_seed(0), bias=0.0)
    stretch(model.head, seed=1)
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("run")
    save_reward_model(reward_model(), run / "model")
    return str(run)


@pytest.fixture(scope="module")
def samples() -> Completions:
    """Prompts padded on the left, completions padded on the right, EOS at the end of some."""
    prompts, prompt_mask = ragged_tokens(batch=ROWS, seq=8)
    tokens, mask = (x.flip(1) for x in ragged_tokens(batch=ROWS, seq=ROWS + 1, seed=1))
    lengths = mask.sum(dim=1)
    tokens[torch.arange(0, ROWS, 2), lengths[::2] - 1] = 2
    return Completions(
        prompts=PromptBatch(
            tokens=prompts, mask=prompt_mask, rows=tuple({"prompt": "p"} for _ in range(ROWS))
        ),
        tokens=tokens,
        mask=mask,
        texts=tuple(f" answer {i}" for i in range(ROWS)),
    )


def test_it_is_a_reward_that_reads_tokens(path):
    assert isinstance(LearnedReward(path=path), Reward)
    assert isinstance(LearnedReward(path=path), ReadsTokens)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 256])
def test_scores_are_the_reward_models_whatever_the_batch_size(path, samples, batch_size):
    scores = LearnedReward(path=path, batch_size=batch_size).load(CPU)(samples)
    expected = reward_model()(samples).detach()
    assert_near(scores, expected)
    assert expected.std() > 0.05
    assert scores.shape == (ROWS,)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    if batch_size >= ROWS:
        assert torch.equal(scores, expected)


def test_no_more_than_the_batch_size_are_scored_at_once(path, samples, monkeypatch):
    sizes = []
    forward = RewardModel.forward

    def counted(self, completions):
        sizes.append(len(completions.texts))
        return forward(self, completions)

    monkeypatch.setattr(RewardModel, "forward", counted)
    LearnedReward(path=path, batch_size=3).load(CPU)(samples)
    assert sizes == [3, 3, 1]


def test_a_policy_of_its_own_tokenizer_is_read(path):
    assert (
        LearnedReward(path=path).check_policy(build_tokenizer(), prepend_bos=True, num_tokens=9)
        is None
    )


def test_a_policy_with_another_tokenizer_is_refused(path):
    reward = LearnedReward(path=path)
    swapped = word_tokenizer([WORDS[1], WORDS[0], *WORDS[2:]])
    expected = r"^reward\.path=.*: token 'one' is 5 there and 4 in the policy\. Train the reward"
    with pytest.raises(ConfigError, match=expected):
        reward.check_policy(swapped, prepend_bos=True, num_tokens=9)
    more = word_tokenizer([*WORDS, "more"])
    with pytest.raises(ConfigError, match=r"token 'more' is none there and 16 in the policy"):
        reward.check_policy(more, prepend_bos=True, num_tokens=9)
    fewer = word_tokenizer(WORDS[:-1])
    with pytest.raises(ConfigError, match=r"token 'no' is 15 there and none in the policy"):
        reward.check_policy(fewer, prepend_bos=True, num_tokens=9)


@pytest.mark.parametrize("trained", [True, False])
def test_prompts_that_begin_in_another_way_are_refused(trained, tmp_path):
    save_reward_model(reward_model(prepend_bos=trained), tmp_path)
    reward = LearnedReward(path=str(tmp_path))
    reward.check_policy(build_tokenizer(), prepend_bos=trained, num_tokens=9)
    expected = (
        rf"^reward\.path=.* was trained with task\.prepend_bos={trained}, but the policy's prompts"
        rf" have task\.prepend_bos={not trained}: make them equal$"
    )
    with pytest.raises(ConfigError, match=expected):
        reward.check_policy(build_tokenizer(), prepend_bos=not trained, num_tokens=9)


def test_a_path_without_a_reward_model_is_refused(tmp_path):
    save_policy(tiny_policy(), tmp_path / "policy")
    calls = (
        lambda reward: reward.load(CPU),
        lambda reward: reward.check_policy(build_tokenizer(), prepend_bos=True, num_tokens=9),
    )
    for call in calls:
        with pytest.raises(ConfigError, match=r"^reward\.path=.*holds no reward model"):
            call(LearnedReward(path=str(tmp_path / "policy")))
        with pytest.raises(ConfigError, match=r"^reward\.path='/missing': no such directory"):
            call(LearnedReward(path="/missing"))
        with pytest.raises(ConfigError, match=r"^reward\.path=.*is a directory without a model"):
            call(LearnedReward(path=str(tmp_path)))


def test_the_fingerprint_follows_the_files(tmp_path):
    save_reward_model(reward_model(), tmp_path / "model")
    reward = LearnedReward(path=str(tmp_path))
    first = reward.fingerprint()
    assert first == reward.fingerprint() == directory_hash(str(tmp_path / "model")) != ""
    (tmp_path / "model" / "reward_head.json").write_text("{}")
    assert reward.fingerprint() != first
    assert LearnedReward(path="artifact:reward_model").fingerprint() == ""
    with pytest.raises(ConfigError, match=r"^reward\.path='/missing': no such directory"):
        LearnedReward(path="/missing").fingerprint()


@pytest.mark.parametrize("wrong", [{"path": ""}, {"path": "x", "batch_size": 0}, {}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError, match=r"at least 1 character|or equal to 1|Missing|requir"):
        LearnedReward(**wrong)


def test_answers_given_as_texts_score_as_their_tokens_do(path):
    model = load_reward_model(path)
    prompts, answers = ["one two three", "four"], [" five", " six seven eight"]
    ids = build_tokenizer().get_vocab()
    rows = [[1, *(ids[w] for w in p.split())] for p in prompts]
    tokens = [[*(ids[w] for w in a.split()), 2] for a in answers]
    expected = [
        model(encode_completions([p], [a], prompt_texts=[""], texts=[""]))
        for p, a in zip(rows, tokens, strict=True)
    ]
    assert_near(score_answers(model, prompts, answers), torch.cat(expected))


@pytest.mark.parametrize("shape", [{"read_layers": 9}, {"width": 9}])
def test_a_head_that_is_not_the_models_is_refused(shape, tmp_path):
    save_reward_model(reward_model(), tmp_path)
    file = tmp_path / "reward_head.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | shape))
    with pytest.raises(ConfigError, match=r"^reward\.path: .* is not the head of this model"):
        LearnedReward(path=str(tmp_path)).load(CPU)


def test_a_policy_that_writes_more_than_it_can_read_is_refused(path):
    reward = LearnedReward(path=path)
    reward.check_policy(build_tokenizer(), prepend_bos=True, num_tokens=CONTEXT_LEN)
    expected = rf"reads {CONTEXT_LEN} tokens, fewer than the {CONTEXT_LEN + 1} of the longest"
    with pytest.raises(ConfigError, match=expected):
        reward.check_policy(build_tokenizer(), prepend_bos=True, num_tokens=CONTEXT_LEN + 1)


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        (["one"], [], "1 prompts and 0 answers"),
        ([], [], "0 prompts and 0 answers"),
        (["one"], [" two" * CONTEXT_LEN], rf"have {CONTEXT_LEN + 3} tokens, more than"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused(path, prompts, answers, message):
    with pytest.raises(ConfigError, match=message):
        score_answers(load_reward_model(path), prompts, answers)


def test_a_long_prompt_and_another_ones_long_answer_fit_side_by_side(path):
    model = load_reward_model(path)
    prompts, answers = ["one " * 20, "two"], [" three", " four" * 20]
    alone = [score_answers(model, [p], [a]) for p, a in zip(prompts, answers, strict=True)]
    assert_near(score_answers(model, prompts, answers), torch.cat(alone))
