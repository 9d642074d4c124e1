"""A reward that reads a scalar reward model, as TRL's RewardTrainer trains it on pairs."""

import torch

from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.rewards.sequence_classifier import SequenceClassifierSettings, Side
from rlhf_exp.settings import ConfigError, settings
from rlhf_exp.types import Completions


@settings
class PairModel(SequenceClassifierSettings):
    """The logit of an AutoModelForSequenceClassification with num_labels=1.

    Its input is that of RewardTrainer in TRL 1.16.0 (`_prepare_dataset`): prompt, completion and
    EOS as one text, with the special tokens that the tokenizer adds; or the conversation as the
    chat template renders it, with nothing added.

    Like RewardTrainer it appends EOS to every text, even to a completion that gen_len cut: the
    model reads its score at the last token, and in training that was always EOS. So it scores a cut
    completion as if it ended there; use stage.missing_eos_penalty against those. The chat template
    closes a turn in the same way. Without EOS in the tokenizer (BERT's) nothing is appended.

    RewardTrainer drops examples that are too long, so the model was not trained on cut ones; the
    default keeps the end of a text, which holds the completion and the position of the score. dtype
    auto is bf16 on CUDA, as in RewardTrainer, and fp32 elsewhere: fp16 overflows in many language
    models. Scores are always fp32.
    """

    truncation_side: Side = "left"
    """The end at which a text that is too long is cut; left keeps the completion."""

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function; it returns scores on `device`, wherever the model is. Raises
        ConfigError if the model cannot be loaded or has more than one output."""
        model = self.open_model(
            device, auto_on_cuda=torch.bfloat16, truncation_side=self.truncation_side
        )
        num_labels = model.model.config.num_labels
        if num_labels != 1:
            raise ConfigError(
                f"reward.name={self.name!r} has {num_labels} outputs, a reward model one; the"
                " probability of a label is reward=classifier"
            )

        def score(completions: Completions) -> torch.Tensor:
            return model.logits(completions, suffix=model.eos)[:, 0].to(device)

        return score
