"""A reward that reads a reward model trained by stage=reward_model.

It reads the policy's tokens, so policy and reward model must share a tokenizer.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.models.hub import directory_hash, locate_model
from rlhf_exp.models.loading import load_context_len, load_tokenizer
from rlhf_exp.models.reward_model import RewardModel, load_reward_model, read_head_shape
from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.settings import ConfigError, Count, Text, settings
from rlhf_exp.tasks.encoding import encode, leading_ids
from rlhf_exp.tasks.pair_tokens import encode_completions
from rlhf_exp.types import Completions


@settings
class LearnedReward:
    """The reward model in a directory or a run's folder, `batch_size` completions at a time."""

    path: Text
    """Directory, run folder or artifact:NAME."""
    batch_size: Count = 256
    """Completions a forward pass."""

    def fingerprint(self) -> str:
        """A hash of the directory's files, "" for an artifact of an earlier step."""
        return directory_hash(locate_model(self.path, field="reward.path"))

    def check_policy(
        self, tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool, num_tokens: int
    ) -> None:
        """Raises ConfigError unless the vocabularies are equal, `prepend_bos` is as in the reward
        model's training and `num_tokens` fit into its context."""
        directory = Path(locate_model(self.path, field="reward.path"))
        shape = read_head_shape(directory)
        vocab = load_tokenizer(str(directory), field="reward.path").get_vocab()
        policy_vocab = tokenizer.get_vocab()
        if vocab != policy_vocab:
            tokens = sorted(vocab.keys() | policy_vocab.keys())
            first = next(t for t in tokens if vocab.get(t) != policy_vocab.get(t))
            ids = [v.get(first, "none") for v in (vocab, policy_vocab)]
            raise ConfigError(
                f"reward.path={self.path}: its tokenizer differs from the policy's: token {first!r}"
                f" is {ids[0]} there and {ids[1]} in the policy."
                " Train the reward model on the model that the policy starts from"
            )
        if shape.prepend_bos != prepend_bos:
            raise ConfigError(
                f"reward.path={self.path} was trained with task.prepend_bos={shape.prepend_bos},"
                f" but the policy's prompts have task.prepend_bos={prepend_bos}: make them equal"
            )
        context_len = load_context_len(str(directory), field="reward.path")
        if num_tokens > context_len:
            raise ConfigError(
                f"reward.path={self.path} reads {context_len} tokens, fewer than the {num_tokens}"
                " of the longest prompt with sampler.gen_len: lower that, or train the reward model"
                " on a model with a longer context"
            )

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function, its model on the device. Raises ConfigError if there is none."""
        model = load_reward_model(self.path, device=device)

        @torch.no_grad()
        def score(completions: Completions) -> torch.Tensor:
            rows = torch.arange(len(completions.texts), device=device).split(self.batch_size)
            return torch.cat([model(completions[index]) for index in rows])

        return score


@torch.no_grad()
def score_answers(
    model: RewardModel, prompts: Sequence[str], answers: Sequence[str]
) -> Float[Tensor, " batch"]:
    """The score of each answer to the prompt of the same index, with EOS appended. An answer begins
    with the space that separates it from the prompt, if there is one. Raises ConfigError for a text
    that the vocabulary cannot encode or that is too long, for different numbers of prompts and
    answers, and for none."""
    if len(prompts) != len(answers) or not prompts:
        raise ConfigError(f"{len(prompts)} prompts and {len(answers)} answers: give equally many")
    tokenizer = model.backbone.tokenizer
    bos = leading_ids(tokenizer, prepend_bos=model.shape.prepend_bos)
    rows = [bos + ids for ids in encode(tokenizer, prompts)]
    ended = [[*ids, tokenizer.eos_token_id] for ids in encode(tokenizer, answers)]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(rows, ended, strict=True))
    if longest > model.backbone.context_len:
        raise ConfigError(
            f"a prompt and its answer have {longest} tokens, more than the reward model's context"
            f" of {model.backbone.context_len}: shorten them"
        )
    return model(
        encode_completions(
            rows,
            ended,
            prompt_texts=prompts,
            texts=answers,
            device=model.backbone.device,
        )
    )
