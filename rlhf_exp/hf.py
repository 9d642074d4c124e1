"""Names of Hugging Face's and TransformerLens' classes, for annotations, and how to silence them.

Importing the classes takes seconds, and a configuration is checked without them: a bad value is
refused before anybody waits for an import. Code that calls them imports them where it calls.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    "quiet_datasets",
    "quieten_transformers",
]


def quieten_transformers() -> None:
    """Silences transformers' warnings and progress bars and the hub's lines for each request; what
    matters of them is an error here."""
    import transformers

    logging.getLogger("httpx2").setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silences `datasets` and the hub's client on stderr; their errors are still raised."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # all: `datasets` greets while it is imported
    try:
        import datasets
        from huggingface_hub.utils.tqdm import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        datasets.disable_progress_bars()
        had_progress_bars = not are_progress_bars_disabled()
        with warnings.catch_warnings(action="ignore"):
            disable_progress_bars()
            try:
                yield
            finally:
                if had_progress_bars:
                    enable_progress_bars()
    finally:
        logging.disable(disabled_level)
