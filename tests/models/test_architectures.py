"""What the table of docs/models_and_data.md says of an architecture is so."""

from pathlib import Path

import pytest

from tests.architectures import ARCHITECTURES, examine

DOCS = Path(__file__).parents[2] / "docs" / "models_and_data.md"

# Of the ways in which an architecture differs from Llama; `make soak` examines all.
DIFFERENT = (
    "bamba",  # loses its position when it decodes without a mask
    "bart",  # counts positions itself
    "falcon with alibi",  # cannot be told which keys to attend to
    "gemma2",  # soft cap
    "gemma3n",  # reads token ids again in every block
    "gptj",  # adds masks
    "mixtral",  # experts
    "rwkv",  # sees padding
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
