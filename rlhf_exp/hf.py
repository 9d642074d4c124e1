"""Names of Hugging Face's and TransformerLens' classes, for annotations alone.

Importing the classes takes seconds, and a configuration is checked without them: a bad value is
refused before anybody waits for an import. Code that calls them imports them where it calls.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
else:
    Cache = PreTrainedModel = PreTrainedTokenizerBase = TransformerBridge = Any

__all__ = [
    "Cache",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "TransformerBridge",
    "quieten_transformers",
]


def quieten_transformers() -> None:
    """Silences transformers' warnings and progress bars and the hub's lines for each request; what
    matters of them is an error here."""
    import transformers

    logging.getLogger("httpx2").setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
