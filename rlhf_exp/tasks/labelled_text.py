"""A user's labelled sentences: a corpus, labels, and prompts from their first words.

Knows the file's format and refuses an ambiguous file; knows no model. Split by hand at line feeds
and tabs: `csv` also ends a row at a carriage return within a text.
"""

import hashlib
import random
import reprlib
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pydantic import model_validator

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import ConfigError, Count, Index, OpenFraction, Text, settings
from rlhf_exp.tasks.protocol import LabelledText, Split
from rlhf_exp.tasks.text_files import read_text

MIN_TEXTS, MIN_TEXTS_PER_LABEL = 200, 20


class LabelledFile(NamedTuple):
    """A file's distinct texts in its order, without those that have two labels."""

    sha256: str
    texts: tuple[LabelledText, ...]
    num_contradictory: int


@settings
class LabelledTextFile:
    """Sentences and labels from a tab-separated UTF-8 file whose header names the columns `label`
    and `text`.

    Quotes have no meaning, so a text cannot contain tabs or newlines. A repeated text counts once.
    Each instance reads the file once.
    """

    path: Text
    """UTF-8 file of tab-separated lines with a header that names the columns label and text."""
    prepend_bos: bool = True
    """Whether a prompt begins with <bos>; true, as in the corpus."""
    vocab_size: Count = 3000
    """Most tokens of the byte-pair tokenizer, 1000 to 8000."""
    held_out_fraction: OpenFraction = 0.1
    """Fraction of texts that are held out; prompts come from these; 0.05 to 0.5."""
    prompt_words_min: Count = 2
    """Words in the shortest prompt; 1 to 4."""
    prompt_words_max: Count = 4
    """Words in the longest prompt; 2 to 8."""
    data_seed: Index = 0
    """Draws the split and the prompts' lengths; any integer from 0."""

    @model_validator(mode="after")
    def _check_prompt_words(self) -> "LabelledTextFile":
        if self.prompt_words_min > self.prompt_words_max:
            raise ConfigError(
                f"task.prompt_words_min={self.prompt_words_min} is above "
                f"task.prompt_words_max={self.prompt_words_max}: lower the one or raise the other"
            )
        return self

    @property
    def num_contradictory(self) -> int:
        """The number of distinct texts that are dropped because they have two labels."""
        return self._contents.num_contradictory

    def fingerprint(self) -> str:
        """The SHA-256 of the file in hexadecimal digits.

        Raises ConfigError if the file cannot be read as described, holds fewer than 200 texts or
        fewer than 20 of a label, or leaves too few for training or for prompts.
        """
        labels = {label for label, _ in self._contents.texts}
        split = self.labelled_split()
        for name, texts in (("train", split.train), ("held-out", split.held_out)):
            absent = sorted(labels - {label for label, _ in texts})
            if absent:
                raise ConfigError(
                    f"task.held_out_fraction={self.held_out_fraction} leaves no {name} text with "
                    f"the label {absent[0]!r}: move it towards 0.5, or add texts to {self.path}"
                )
        if not self.train_prompts() or not self.eval_prompts():
            raise ConfigError(
                f"task.path: {len(split.held_out)} held-out texts of {self.path} give "
                f"{len(self.train_prompts())} prompts to train on and {len(self.eval_prompts())} "
                "others to evaluate on: raise task.held_out_fraction or set task.prompt_words_min "
                "and task.prompt_words_max below the length of the texts"
            )
        return self._contents.sha256

    def train_prompts(self) -> tuple[str, ...]:
        """The first words of one half of the held-out texts, if the text has further words."""
        held_out = self.labelled_split().held_out
        return self._prompts(held_out[: len(held_out) // 2])

    def eval_prompts(self) -> tuple[str, ...]:
        """The first words of the other half, without those that are training prompts."""
        held_out = self.labelled_split().held_out
        trained = set(self.train_prompts())
        prompts = self._prompts(held_out[len(held_out) // 2 :])
        return tuple(prompt for prompt in prompts if prompt not in trained)

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """A byte-pair tokenizer trained on the training texts."""
        from rlhf_exp.tasks.tokenizers import byte_pair_tokenizer

        return byte_pair_tokenizer(self.language_split().train, vocab_size=self.vocab_size)

    def language_split(self) -> Split[str]:
        """The texts of `labelled_split`."""
        train, held_out = self.labelled_split()
        return Split(tuple(t.text for t in train), tuple(t.text for t in held_out))

    def labelled_split(self) -> Split[LabelledText]:
        """The texts of the file in random order, with `held_out_fraction` of them held out."""
        texts = list(self._contents.texts)
        random.Random(self.data_seed).shuffle(texts)
        num_held_out = round(self.held_out_fraction * len(texts))
        return Split(train=tuple(texts[num_held_out:]), held_out=tuple(texts[:num_held_out]))

    def _prompts(self, texts: tuple[LabelledText, ...]) -> tuple[str, ...]:
        prompts = []
        for _, text in texts:
            words = text.split()
            # Seeded by the text, so that a prompt does not change when other texts are added.
            rng = random.Random(f"{self.data_seed} {text}")
            num_words = rng.randint(self.prompt_words_min, self.prompt_words_max)
            if len(words) > num_words:
                prompts.append(" ".join(words[:num_words]))
        return tuple(prompts)

    @cached_property
    def _contents(self) -> LabelledFile:
        return read_labelled_file(self.path, field="task.path")


def read_labelled_file(name: str, *, field: str) -> LabelledFile:
    """The texts of a tab-separated file. Raises ConfigError naming the file, and the configuration
    key `field`, if it cannot be read as `LabelledTextFile` says, holds fewer than 200 texts or
    fewer than 20 of a label."""
    path = Path(name).expanduser()
    labels_of: dict[str, set[str]] = {}
    for label, text in _parse(read_text(path, field=field), path, field):
        labels_of.setdefault(text, set()).add(label)
    texts = tuple(
        LabelledText(next(iter(labels)), text)
        for text, labels in labels_of.items()
        if len(labels) == 1
    )
    num_contradictory = len(labels_of) - len(texts)
    _check_counts(texts, num_contradictory, path, field)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return LabelledFile(digest, texts, num_contradictory)


def _parse(contents: str, path: Path, field: str) -> list[LabelledText]:
    if not contents.strip():
        raise ConfigError(
            f"{field}: {path} is empty: give tab-separated lines with the columns label and text"
        )
    # Not splitlines(), which also splits at characters that sentences may contain.
    lines = contents.rstrip("\r\n").split("\n")
    header = [name.strip() for name in lines[0].split("\t")]
    if header.count("label") != 1 or header.count("text") != 1:
        raise ConfigError(
            f"{field}: {path}, line 1 must name the columns label and text once each, separated "
            f"by tabs; it names {reprlib.repr(header)}"
        )
    label_column, text_column = header.index("label"), header.index("text")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ConfigError(
                f"{field}: {path}, line {number} has {len(cells)} columns where the header has "
                f"{len(header)}: remove blank lines, and tabs and line ends within a text"
            )
        row = LabelledText(cells[label_column].strip(), cells[text_column].strip())
        for name, cell in row._asdict().items():
            if not cell:
                raise ConfigError(
                    f"{field}: {path}, line {number} has an empty {name}: fill it in or remove "
                    "the line"
                )
        rows.append(row)
    return rows


def _check_counts(
    texts: tuple[LabelledText, ...], num_contradictory: int, path: Path, field: str
) -> None:
    contents = f"{field}: {path} has {len(texts)} distinct texts"
    if num_contradictory:
        contents += f" (and {num_contradictory} with two labels, which are dropped)"
    if len(texts) < MIN_TEXTS:
        raise ConfigError(f"{contents}: give at least {MIN_TEXTS}")
    counts = Counter(label for label, _ in texts)
    rarest, num_rarest = counts.most_common()[-1]
    if len(counts) < 2:
        raise ConfigError(f"{contents}, all with the label {rarest!r}: give at least two labels")
    if num_rarest < MIN_TEXTS_PER_LABEL:
        raise ConfigError(
            f"{contents}, {num_rarest} of them with the label {rarest!r}: give at least "
            f"{MIN_TEXTS_PER_LABEL} of every label"
        )
