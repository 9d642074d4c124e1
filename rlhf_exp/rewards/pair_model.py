"""The score of a scalar reward model, as TRL's RewardTrainer trains it on pairs of answers."""

import torch

from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.rewards.sequence_classifier import SequenceClassifierSettings, Side
from rlhf_exp.settings import ConfigError, settings
from rlhf_exp.types import Completions


@settings
class PairModel(SequenceClassifierSettings):
    """The output of an AutoModelForSequenceClassification with num_labels=1, its logit.

    It reads what RewardTrainer of TRL 1.16.0 trains on (`_prepare_dataset`): the texts of prompt
    and completion joined, EOS behind them, with the special tokens that the tokenizer adds by
    itself; or the conversation as the chat template renders it, nothing added.

    EOS is put behind every text, behind a completion that gen_len cut as well, as RewardTrainer
    does: the model reads its score at the end, and it has learned to read it at EOS alone. So it
    judges a cut completion as if it ended there; stage.missing_eos_penalty is for what did not end.
    The chat template closes a turn likewise. A tokenizer that has no EOS (BERT's) adds what it
    adds.

    RewardTrainer leaves out examples that are too long, so no way of cutting is the one it was
    trained with; the default keeps the end, where the completion is and the score is read.
    dtype auto is bf16 on CUDA, as RewardTrainer computes there, and fp32 elsewhere: fp16 overflows
    in many language models. Scores are fp32 either way.
    """

    truncation_side: Side = "left"
    """Which end of a too long text is cut: left keeps the completion."""

    def load(self, device: torch.device) -> RewardFunction:
        """The function, the model on its device, the scores on the given one. Raises ConfigError if
        the model cannot be loaded or has more than one output."""
        model = self.open_model(
            device, auto_on_cuda=torch.bfloat16, truncation_side=self.truncation_side
        )
        num_labels = model.model.config.num_labels
        if num_labels != 1:
            raise ConfigError(
                f"reward.name={self.name!r} has {num_labels} outputs, a reward model one; the"
                " probability of a label is reward=classifier"
            )
        ending = model.tokenizer.eos_token or ""

        def score(completions: Completions) -> torch.Tensor:
            return model.logits(completions, ending=ending)[:, 0].to(device)

        return score
