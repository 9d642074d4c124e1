"""TransformerLens over the current weights of a Hugging Face model.

TransformerBridge wraps a model in place, and on some architectures it splits fused attention
weights into new parameters. Here the bridge wraps a twin that shares every tensor, so the original
stays a plain module. Each call recomputes the split weights from the original: they are never
stale, and gradients reach the original's parameters.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_exp.functional.logprobs import logits_agree
from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase, TransformerBridge
from rlhf_exp.models.editing import BridgeHook
from rlhf_exp.settings import ConfigError

T = TypeVar("T")

# After the affine weights, unlike ln_final.hook_normalized: this is Hugging Face's
# last_hidden_state, so that the value head has the same input in both engines.
VALUE_HEAD_HOOK = "ln_final.hook_out"


def boot_bridge(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> TransformerBridge:
    """A TransformerBridge that shares the model's tensors and does not change the model.

    If the architecture's adapter copies weights (GPT-NeoX), the copies are stale after the next
    optimizer step: boot another bridge. Raises ConfigError for an architecture that TransformerLens
    does not support, and if its logits differ from the model's.
    """
    shared = {id(t): t for t in (*language_model.parameters(), *language_model.buffers())}
    name = type(language_model).__name__
    tokens = torch.arange(min(8, len(tokenizer)), device=language_model.device)[None]
    try:
        bridge = _boot(copy.deepcopy(language_model, shared), tokenizer)
        with torch.no_grad():
            logits = bridge(tokens, return_type="logits")
    except Exception as error:  # adapters raise different errors
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ConfigError(
            f"TransformerLens cannot open {name}: {reason}\nuse model.engine=fast, and the plain"
            " module instead of policy.hooked()"
        ) from error
    with torch.no_grad():
        expected = language_model(input_ids=tokens, use_cache=False).logits
    if not logits_agree(logits, expected, dtype=language_model.dtype):
        raise ConfigError(
            f"TransformerLens and transformers compute different logits for this {name}: use"
            " model.engine=fast, and the plain module instead of policy.hooked()"
        )
    return bridge


def _boot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    from transformer_lens.model_bridge import TransformerBridge as Bridge
    from transformers import AutoTokenizer

    model.set_attn_implementation("eager")
    # The boot loads the tokenizer again from a directory (to make it prepend BOS), so it gets one
    # that exists even if the tokenizer came from elsewhere. TransformerLens draws weights before it
    # replaces them, which must not advance the global generator.
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        tokenizer.save_pretrained(folder)
        bridge = Bridge.boot_transformers(
            folder,
            hf_model=model,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            device=model.device,
            dtype=model.dtype,
        )
    bridge.cfg.model_name = tokenizer.name_or_path
    bridge.eval()
    return bridge


class _Caller(nn.Module):
    """Lets torch.func.functional_call call any method of a bridge, not only its forward."""

    def __init__(self, bridge: TransformerBridge) -> None:
        super().__init__()
        self.bridge = bridge

    def forward(self, use: Callable[[TransformerBridge], T]) -> T:
        return use(self.bridge)


class HookedView:
    """A bridge whose calls use the model's current weights and give them gradients."""

    def __init__(self, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._parameters = dict(language_model.named_parameters())
        self._caller = _Caller(boot_bridge(language_model, tokenizer))
        self._sources = _find_sources(self._caller, language_model, tokenizer)

    def call(self, use: Callable[[TransformerBridge], T]) -> T:
        """`use(bridge)` with the model's current weights."""
        current: dict[str, Tensor] = {
            name: self._parameters[source].flatten()[index]
            for name, (source, index) in self._sources.items()
        }
        return torch.func.functional_call(self._caller, current, (use,))

    def run_with_value_head(
        self,
        value_head: nn.Module | None,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        hooks: Sequence[BridgeHook] = (),
    ) -> tuple[
        Float[Tensor, "batch seq vocab"],
        Float[Tensor, "batch seq"] | None,
        Float[Tensor, "batch seq d_model"],
    ]:
        """Logits, values (None without a head) and final hidden states. The value head runs as a
        hook function, after `hooks`."""
        outputs: dict[str, Tensor] = {}

        def value_hook(activation: Tensor, hook: Any) -> None:
            outputs["hidden"] = activation
            if value_head is not None:
                outputs["values"] = value_head(activation.float()).squeeze(-1)

        logits = self.call(
            lambda bridge: bridge.run_with_hooks(
                tokens,
                return_type="logits",
                fwd_hooks=[*hooks, (VALUE_HEAD_HOOK, value_hook)],
                attention_mask=mask.long(),
            )
        )
        return logits, outputs.get("values"), outputs["hidden"]


def _find_sources(
    caller: _Caller, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, tuple[str, Int[Tensor, "*axes"]]]:
    """Finds, for each parameter that the bridge created, the model's parameter with its elements,
    and their flat indices in it.

    They are read from a bridge over a copy whose weights are numbered consecutively, which works
    for any adapter that only selects and permutes. It temporarily needs 8 bytes a weight. Raises
    ConfigError for an adapter that combines weights.
    """
    model_ids = {id(p) for p in language_model.parameters()}
    created = [name for name, p in caller.named_parameters() if id(p) not in model_ids]
    if not created:
        return {}
    numbered = copy.deepcopy(language_model).double()
    starts: list[tuple[int, str]] = []
    start = 1
    with torch.no_grad():
        for name, parameter in numbered.named_parameters():
            starts.append((start, name))
            ids = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
            parameter.copy_(ids.view_as(parameter))
            start += parameter.numel()
    probe = dict(_Caller(_boot(numbered, tokenizer)).named_parameters())
    sources = {}
    for name in created:
        ids = probe[name].detach()
        offset, source = max(entry for entry in starts if entry[0] <= ids.min())
        index = (ids - offset).long()
        size = language_model.get_parameter(source).numel()
        if not (torch.equal(index + offset, ids) and 0 <= index.min() <= index.max() < size):
            raise ConfigError(
                f"model.engine=hooked: TransformerLens computes {name} from several weights of"
                f" {type(language_model).__name__}; use model.engine=fast for this architecture"
            )
        sources[name] = (source, index)
    return sources
