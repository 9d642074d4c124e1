"""Problems with the settings of a model, as messages, before its weights are read."""

from pathlib import Path

from rlhf_exp.models.engines import ENGINES
from rlhf_exp.models.hub import refuse_encoder
from rlhf_exp.models.loading import ModelSettings, Pretrained
from rlhf_exp.settings import ConfigError


def must_be_fp32(model: ModelSettings) -> list[str]:
    """A message if the model's weights are to be trained and are not fp32."""
    if isinstance(model, Pretrained) and model.dtype != "fp32":
        return [
            f"model.dtype={model.dtype}: weights that are trained must be fp32, or small updates"
            " are rounded away; set it fp32 (in PPO bf16 goes with finetune=lora)"
        ]
    return []


def must_be_causal(model: ModelSettings) -> list[str]:
    """A message if the model's directory holds an encoder, which cannot continue a text. Raises
    ConfigError if there is no such model; does not read its weights."""
    if not isinstance(model, Pretrained):
        return []
    source = model.locate()
    if source is None or not Path(source).is_dir():  # a GGUF file, or known only when it is loaded
        return []
    try:
        refuse_encoder(source, "model.base_model", model.base_model, model.trust_remote_code)
    except ConfigError as error:
        return [str(error)]
    return []


def must_be_plain(model: ModelSettings, *, stage: str) -> list[str]:
    """Messages about settings of a model that the supervised stage cannot train."""
    return must_be_fp32(model) + must_be_fast(model, stage=stage)


def must_be_fast(model: ModelSettings, *, stage: str) -> list[str]:
    """A message if another engine than the fast one is to run the stage's passes."""
    if not ENGINES[model.engine].is_plain:
        return [f"model.engine=hooked is for stage=ppo; stage={stage} trains with engine=fast"]
    return []
