"""A reward model: a language model that computes features of a completion, and a head on them.

Knows tensors of token ids and files, not how the scores are trained.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from rlhf_exp.functional.logprobs import completion_part, token_logprobs
from rlhf_exp.functional.masking import masked_fill_zero
from rlhf_exp.models.fast_paths import with_fast_paths
from rlhf_exp.models.freezing import freeze_first_layers
from rlhf_exp.models.hub import locate_model
from rlhf_exp.models.loading import load_language_model
from rlhf_exp.models.policy import draw_linear
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Completions, Record, record

HEAD_FILE, SHAPE_FILE = "reward_head.safetensors", "reward_head.json"
HeadKind = Literal["token_sum", "last_token"]


@record
class RewardFeatures(Record):
    """The input of a head, for a completion of n tokens with EOS. `states` are the n + 1 outputs of
    the last blocks, concatenated, after the prompt and after each token; `logprobs` are the
    language model's at temperature 1; padding holds 0. `last` is the index of the state after the
    last token that is not EOS."""

    states: Float[Tensor, "batch seq d_model"]
    logprobs: Float[Tensor, "batch completion"]
    mask: Bool[Tensor, "batch completion"]
    last: Int[Tensor, " batch"]


class LastTokenHead(nn.Module):
    """LayerNorm, Linear(d, width), ReLU, Linear(width, 1) on the state after the last token that is
    not EOS; the head of the notebook on reward models has width d."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, width), nn.ReLU())
        self.score = nn.Linear(width, 1)

    def forward(self, features: RewardFeatures) -> Float[Tensor, " batch"]:
        """A score for each completion."""
        return self.score(self.out(self.condense(features).states[:, 0])).squeeze(-1)

    def condense(self, features: RewardFeatures) -> RewardFeatures:
        """The features without the states that this head does not read."""
        if features.states.shape[1] == 1:
            return features
        rows = torch.arange(len(features.last), device=features.last.device)
        return RewardFeatures(
            states=features.states[rows, features.last][:, None],
            logprobs=features.logprobs[:, :0],
            mask=features.mask[:, :0],
            last=torch.zeros_like(features.last),
        )


class TokenSumHead(nn.Module):
    """A small network on a sum over the tokens.

    An MLP turns the states before and after a token and its log-prob into a vector. A second
    network turns the sum of the vectors over the completion, with the summed log-prob, into the
    score. Unlike the last state, the sum shows an error at any token.
    """

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.token = nn.Sequential(
            nn.Linear(2 * d_model + 1, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )
        self.out = nn.Sequential(nn.Linear(width + 1, width), nn.GELU())
        self.score = nn.Linear(width, 1)

    def forward(self, features: RewardFeatures) -> Float[Tensor, " batch"]:
        """A score for each completion."""
        states_before, states_after = features.states[:, :-1], features.states[:, 1:]
        inputs = torch.cat([states_before, states_after, features.logprobs[..., None]], dim=-1)
        # Only real tokens: about half of all positions are padding.
        tokens = self.token(inputs[features.mask])
        rows = features.mask.nonzero()[:, 0]
        total = tokens.new_zeros((len(features.mask), tokens.shape[1])).index_add(0, rows, tokens)
        total = torch.cat([total, features.logprobs.sum(dim=1, keepdim=True)], dim=1)
        return self.score(self.out(total)).squeeze(-1)

    def condense(self, features: RewardFeatures) -> RewardFeatures:
        return features


HEADS: dict[str, type[LastTokenHead] | type[TokenSumHead]] = {
    "last_token": LastTokenHead,
    "token_sum": TokenSumHead,
}


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The shape of a saved head: its kind and width, the number of blocks whose outputs it reads,
    and whether its training prompts begin with BOS."""

    kind: HeadKind
    width: int
    read_layers: int
    prepend_bos: bool


class RewardModel(nn.Module):
    """Scores completions with a head on a language model's states.

    The language model stays in evaluation mode, so that features are equal at every call.
    """

    def __init__(self, backbone: CausalTransformer, shape: HeadShape) -> None:
        super().__init__()
        self.backbone, self.shape = backbone, shape
        blocks = backbone.language_model.config.num_hidden_layers
        if shape.read_layers > blocks:
            raise ValueError(f"the model has {blocks} blocks, fewer than read_layers")
        d_model = backbone.language_model.get_output_embeddings().weight.shape[1]
        self.head: LastTokenHead | TokenSumHead = HEADS[shape.kind](
            d_model * shape.read_layers, shape.width
        ).to(backbone.device)

    def forward(self, completions: Completions) -> Float[Tensor, " batch"]:
        """A score for each completion."""
        return self.head(self.features(completions))

    def features(self, completions: Completions) -> RewardFeatures:
        """The head's input for the completions, in fp32."""
        start, mask = completions.prompt_len, completions.mask
        layers = self.backbone.last_layers(*completions.sequences, self.shape.read_layers)
        # At temperature 1: the sampler's temperature must not change the reward model.
        logits = self.backbone.unembed(completion_part(layers[-1], start)).float()
        logprobs = token_logprobs(logits, completions.tokens)
        real = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)[..., None]
        states = torch.cat([layer[:, start - 1 :] for layer in layers], dim=-1).float()
        is_eos = completions.tokens == self.backbone.tokenizer.eos_token_id
        return RewardFeatures(
            states=masked_fill_zero(states, real.expand_as(states)),
            logprobs=masked_fill_zero(logprobs, mask),
            mask=mask,
            last=(mask & ~is_eos).sum(dim=1),
        )

    def unfreeze(self, num_layers: int) -> None:
        """Freezes the language model except its last `num_layers` blocks and the final layer norm.
        Raises ValueError if there are fewer blocks."""
        freeze_first_layers(self.backbone.language_model, num_layers, field="unfreeze_layers")

    def initialise_head(self, generator: torch.Generator, *, bias: float) -> None:
        """Draws the head's weights with nn.Linear's default distribution; its scores start around
        `bias`."""
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                draw_linear(layer, generator)
        nn.init.constant_(self.head.score.bias, bias)

    def shift(self, amount: float) -> None:
        """Adds a constant to every score."""
        bias = self.head.score.bias
        nn.init.constant_(bias, bias.item() + amount)


def save_reward_model(model: RewardModel, path: str | Path) -> Path:
    """Writes the language model, its tokenizer and the head to the directory and returns the path.
    A reloaded model gives bit-equal scores."""
    path = Path(path)
    model.backbone.language_model.save_pretrained(path)
    model.backbone.tokenizer.save_pretrained(path)
    save_model(model.head, str(path / HEAD_FILE), metadata={"format": "pt"})
    (path / SHAPE_FILE).write_text(json.dumps(asdict(model.shape), indent=2) + "\n")
    return path


def load_reward_model(path: str | Path, *, device: torch.device | str = "cpu") -> RewardModel:
    """A reward model from its directory or a run's folder. Raises ConfigError if there is none."""
    directory = Path(locate_model(str(path), field="reward.path"))
    shape = read_head_shape(directory)
    language_model, tokenizer = load_language_model(str(directory), field="reward.path")
    backbone = with_fast_paths(CausalTransformer(language_model.to(device), tokenizer))
    try:
        model = RewardModel(backbone, shape)
        model.head.load_state_dict(load_file(directory / HEAD_FILE))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"reward.path: {directory / HEAD_FILE} is not the head of this model: train the reward"
            f" model again.\n  {str(error).splitlines()[0]}"
        ) from error
    return model.eval().requires_grad_(False)


def read_head_shape(directory: Path) -> HeadShape:
    """The shape of the head saved in a directory. Raises ConfigError if there is none."""
    try:
        return HeadShape(**json.loads((directory / SHAPE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"reward.path={str(directory)!r} holds no reward model ({SHAPE_FILE}): name the folder"
            " of a run of stage=reward_model (one with stage.head=classifier is for"
            " reward=pair_model)"
        ) from error
