"""TransformerLens over a Hugging Face model's own, current weights.

TransformerBridge wraps in place and on some architectures splits fused attention weights into
parameters of its own. Here the bridge wraps a twin that shares every tensor, so the original stays
a plain module, and whatever the bridge split is recomputed from the original at each call: nothing
goes stale, and gradients reach the original's parameters.
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

# After the affine weights, unlike ln_final.hook_normalized: equal to Hugging Face's
# last_hidden_state, so that both engines give the value head the same input.
VALUE_HEAD_HOOK = "ln_final.hook_out"


def boot_bridge(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> TransformerBridge:
    """A TransformerBridge that shares the model's tensors and leaves the model itself untouched.

    Where the architecture's adapter copies weights (GPT-NeoX) the copies are of this moment: after
    a further optimizer step boot another one. Raises ConfigError for an architecture that
    TransformerLens does not know, and where its logits are not the model's.
    """
    shared = {id(t): t for t in (*language_model.parameters(), *language_model.buffers())}
    name = type(language_model).__name__
    tokens = torch.arange(min(8, len(tokenizer)), device=language_model.device)[None]
    try:
        bridge = _boot(copy.deepcopy(language_model, shared), tokenizer)
        with torch.no_grad():
            logits = bridge(tokens, return_type="logits")
    except Exception as error:  # each adapter fails in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ConfigError(
            f"TransformerLens cannot open {name}: {reason}\nuse model.engine=fast, and the plain"
            " module in place of policy.hooked()"
        ) from error
    with torch.no_grad():
        expected = language_model(input_ids=tokens, use_cache=False).logits
    if not logits_agree(logits, expected, dtype=language_model.dtype):
        raise ConfigError(
            f"TransformerLens computes something else than transformers for this {name}: use"
            " model.engine=fast, and the plain module in place of policy.hooked()"
        )
    return bridge


def _boot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    from transformer_lens.model_bridge import TransformerBridge as Bridge
    from transformers import AutoTokenizer

    model.set_attn_implementation("eager")
    # The boot reads the tokenizer anew from the directory it is given (to have it prepend BOS), so
    # it gets one that surely exists, whatever the tokenizer came from.
    # TransformerLens draws weights before it replaces them; the global generator stays out of it.
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
    """Lets torch.func.functional_call reach every method of a bridge, not only its forward."""

    def __init__(self, bridge: TransformerBridge) -> None:
        super().__init__()
        self.bridge = bridge

    def forward(self, use: Callable[[TransformerBridge], T]) -> T:
        return use(self.bridge)


class HookedView:
    """A bridge for calls whose results and gradients are those of the model's current weights."""

    def __init__(self, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._parameters = dict(language_model.named_parameters())
        self._caller = _Caller(boot_bridge(language_model, tokenizer))
        self._sources = _find_sources(self._caller, language_model, tokenizer)

    def call(self, use: Callable[[TransformerBridge], T]) -> T:
        """`use(bridge)`, every weight of the bridge being the model's of this moment."""
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
        """Logits, the values that the head, if there is one, computes as a hook function, and its
        input. Other hook functions come before the head's."""
        seen: dict[str, Tensor] = {}

        def value_hook(activation: Tensor, hook: Any) -> None:
            seen["hidden"] = activation
            if value_head is not None:
                seen["values"] = value_head(activation.float()).squeeze(-1)

        logits = self.call(
            lambda bridge: bridge.run_with_hooks(
                tokens,
                return_type="logits",
                fwd_hooks=[*hooks, (VALUE_HEAD_HOOK, value_hook)],
                attention_mask=mask.long(),
            )
        )
        return logits, seen.get("values"), seen["hidden"]


def _find_sources(
    caller: _Caller, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, tuple[str, Int[Tensor, "*axes"]]]:
    """For each parameter that is the bridge's own: the model's parameter it was cut from, and the
    flat index there of each element.

    Found by booting a bridge over a copy whose weights are numbered consecutively, so it holds for
    any adapter that only selects and permutes. Needs 8 bytes a weight for a moment. Raises
    ConfigError for an adapter that computes something else.
    """
    model_ids = {id(p) for p in language_model.parameters()}
    own = [name for name, p in caller.named_parameters() if id(p) not in model_ids]
    if not own:
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
    for name in own:
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
