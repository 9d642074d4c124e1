"""What the table of docs/models_and_data.md says of an architecture is so."""

from pathlib import Path

import pytest

from tests.architectures import ARCHITECTURES, examine

DOCS = Path(__file__).parents[2] / "docs" / "models_and_data.md"

# One for each way in which an architecture differs from Llama.
DIFFERENT = (
    "bamba",  # loses its position when it decodes without a mask
    "bart",  # counts positions itself
    "falcon with alibi",  # cannot be told which keys to attend to
    "gemma2",  # soft cap
    "gemma3n",  # reads token ids again in every block
    "gpt_neo",  # finds its window by counting keys
    "gptj",  # adds masks
    "granite",  # scaled logits
    "jamba",  # states and keys side by side
    "lfm2",  # convolutions
    "llama, eager",
    "mixtral",  # experts
    "phi3, longrope",
    "qwen3_next",  # recurrent states
    "rwkv",  # sees padding
    "xglm",  # adds masks, and leaks between packed examples
)


def table() -> list[str]:
    return [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_table_is_true(name: str, tmp_path: Path) -> None:
    assert str(examine(name, tmp_path)) in table()


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - set(DIFFERENT)))
def test_the_whole_table_is_true(name: str, tmp_path: Path) -> None:
    assert str(examine(name, tmp_path)) in table()


def test_the_table_has_all_architectures() -> None:
    named = {line.split("|")[1].strip() for line in table()}
    assert named >= ARCHITECTURES.keys()
