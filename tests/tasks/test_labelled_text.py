import hashlib
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ValidationError

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.labelled_text import LabelledTextFile
from rlhf_exp.tasks.protocol import CorpusTask, LabelledText
from rlhf_exp.tasks.reviews import Reviews

CONF = Path(__file__).parents[2] / "conf/task"
ROWS = Reviews(num_labelled=300, num_held_out=1).labelled_split().train


def write(path, lines, header="label\ttext"):
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return str(path)


def lines_of(rows):
    return [f"{label}\t{text}" for label, text in rows]


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "texts.tsv", lines_of(ROWS))


def test_the_splits_are_one_and_hold_every_text_once(path):
    task = LabelledTextFile(path=path, held_out_fraction=0.2)
    assert isinstance(task, CorpusTask)
    split = task.labelled_split()
    language = task.language_split()
    for labelled, texts in zip(split, language, strict=True):
        assert texts == tuple(text for _, text in labelled)
    assert len(split.held_out) == 60
    assert sorted(split.train + split.held_out) == sorted(ROWS)
    assert split.train[:10] != ROWS[:10]


def test_the_seed_decides_the_split(path):
    split = LabelledTextFile(path=path).language_split()
    assert LabelledTextFile(path=path).language_split() == split
    other = LabelledTextFile(path=path, data_seed=1).language_split()
    assert set(other.held_out) != set(split.held_out)


def test_prompts_are_first_words_of_the_two_held_out_halves(path):
    task = LabelledTextFile(
        path=path, held_out_fraction=0.5, prompt_words_min=3, prompt_words_max=5
    )
    held_out = task.language_split().held_out
    halves = held_out[:75], held_out[75:]
    train, evaluation = task.train_prompts(), task.eval_prompts()
    assert len(train) == 75
    assert 0 < len(evaluation) < 75
    assert {len(prompt.split()) for prompt in train} == {3, 4, 5}
    assert all(text.startswith(f"{p} ") for text, p in zip(halves[0], train, strict=True))
    assert all(any(text.startswith(f"{p} ") for text in halves[1]) for p in evaluation)
    assert set(train).isdisjoint(evaluation)
    again = LabelledTextFile(
        path=path, held_out_fraction=0.5, prompt_words_min=3, prompt_words_max=5
    )
    assert (again.train_prompts(), again.eval_prompts()) == (train, evaluation)


def test_a_prompt_of_both_halves_is_trained_on_alone(path):
    task = LabelledTextFile(
        path=path, held_out_fraction=0.5, prompt_words_min=1, prompt_words_max=1
    )
    halves = task.language_split().held_out[:75], task.language_split().held_out[75:]
    first = [[text.split()[0] for text in half] for half in halves]
    assert list(task.train_prompts()) == first[0]
    assert list(task.eval_prompts()) == [word for word in first[1] if word not in first[0]]


def test_texts_no_longer_than_the_prompt_give_none(tmp_path):
    rows = [("pos" if i % 2 else "neg", f"w{i} is" + " long" * (i % 4)) for i in range(400)]
    task = LabelledTextFile(
        path=write(tmp_path / "t.tsv", lines_of(rows)), prompt_words_min=3, prompt_words_max=3
    )
    longer = [text for text in task.language_split().held_out if len(text.split()) > 3]
    prompts = task.train_prompts() + task.eval_prompts()
    assert list(prompts) == [" ".join(text.split()[:3]) for text in longer]


def test_the_tokenizer_is_trained_on_training_texts_alone(tmp_path):
    rows = [("pos" if i % 2 else "neg", f"it is text {i} of many") for i in range(200)]
    task = LabelledTextFile(path=write(tmp_path / "t.tsv", lines_of(rows)), vocab_size=100)
    odd = task.labelled_split().held_out[0]
    rows[rows.index(odd)] = (odd.label, "zzzz zzzz zzzz zzzz")
    task = LabelledTextFile(path=write(tmp_path / "t.tsv", lines_of(rows)), vocab_size=100)
    assert "zzzz zzzz zzzz zzzz" in task.language_split().held_out
    tokenizer = task.build_tokenizer()
    assert len(tokenizer) <= 100
    assert not any("z" in token for token in tokenizer.get_vocab())
    text = task.language_split().train[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_fingerprint_is_the_hash_of_the_bytes_and_the_file_is_read_once(path, tmp_path):
    task = LabelledTextFile(path=path)
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert task.fingerprint() == digest
    split = task.language_split()
    write(tmp_path / "texts.tsv", lines_of([*ROWS[1:], LabelledText("pos", "another")]))
    assert (task.fingerprint(), task.language_split()) == (digest, split)
    assert LabelledTextFile(path=path).fingerprint() != digest


def test_columns_stand_in_any_order_and_others_are_ignored(path, tmp_path):
    lines = [f"{i}\t{text} \t x\t {label}" for i, (label, text) in enumerate(ROWS)]
    other = write(tmp_path / "other.tsv", lines, header="id\ttext\tsource\tlabel")
    split = LabelledTextFile(path=other).language_split()
    assert split == LabelledTextFile(path=path).language_split()


def test_bom_line_ends_quotes_and_line_separators_of_unicode_are_taken_as_they_are(tmp_path):
    texts = [f'"quoted {i} , said\u2028he, in part\u0085 .' for i in range(200)]
    lines = [f"{'pos' if i % 2 else 'neg'}\t{text}" for i, text in enumerate(texts)]
    contents = "\r\n".join(["label\ttext", *lines, "", ""])
    (tmp_path / "t.tsv").write_bytes(contents.encode("utf-8-sig"))
    split = LabelledTextFile(path=str(tmp_path / "t.tsv")).language_split()
    assert sorted(split.train + split.held_out) == sorted(texts)


def test_repeated_texts_count_once_and_contradictory_ones_not_at_all(tmp_path):
    extra = [ROWS[0], ROWS[0], LabelledText("other", ROWS[1].text)]
    task = LabelledTextFile(path=write(tmp_path / "t.tsv", lines_of([*ROWS, *extra])))
    split = task.labelled_split()
    assert sorted(split.train + split.held_out) == sorted({*ROWS} - {ROWS[1]})
    assert task.num_contradictory == 1


def test_the_home_folder_may_be_a_tilde(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LabelledTextFile(path="~/texts.tsv").num_contradictory == 0


BAD_FILES = {
    "empty": (b"", r"bad\.tsv is empty"),
    "blank": (b"\xef\xbb\xbf\n \n", r"bad\.tsv is empty"),
    "not UTF-8": (b"label\ttext\npos\tok\npos\tcaf\xe9 .\n", r"bad\.tsv, line 3 is not UTF-8"),
    "no text": (b"label\tsentence\npos\tok\n", r"line 1 must .*\['label', 'sentence'\]"),
    "no label": (b"class\ttext\npos\tok\n", r"line 1 must .*\['class', 'text'\]"),
    "commas": (b"label,text\npos,ok\n", r"line 1 must .* by tabs; it names \['label,text'\]"),
    "two texts": (b"label\ttext\ttext\npos\ta\tb\n", r"line 1 must name .* once each"),
    "tab in text": (b"label\ttext\npos\tok\npos\ta\tb\n", r"line 3 has 3 columns .* header has 2"),
    "blank line": (b"label\ttext\npos\tok\n\npos\tok\n", r"line 3 has 1 columns .* blank lines"),
    "empty text": (b"label\ttext\npos\tok\npos\t \n", r"line 3 has an empty text: fill it in"),
    "empty label": (b"label\ttext\n\tok\n", r"line 2 has an empty label: fill it in"),
}


@pytest.mark.parametrize(("contents", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_malformed_file_is_refused_with_its_line(tmp_path, contents, message):
    (tmp_path / "bad.tsv").write_bytes(contents)
    with pytest.raises(ConfigError, match=rf"(?s)^task\.path: .*{message}") as error:
        LabelledTextFile(path=str(tmp_path / "bad.tsv")).fingerprint()
    assert len(str(error.value).splitlines()) <= 3


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.path: cannot read .*nowhere.* \(No such file"):
        LabelledTextFile(path=str(tmp_path / "nowhere.tsv")).fingerprint()
    with pytest.raises(ConfigError, match=r"task\.path: cannot read .* \(Is a directory\)"):
        LabelledTextFile(path=str(tmp_path)).fingerprint()


def numbered(counts):
    return [f"{label}\ttext {label} {i} ." for label, count in counts.items() for i in range(count)]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"pos": 100, "neg": 99}, "has 199 distinct texts: give at least 200"),
        ({"pos": 200}, "200 distinct texts, all with the label 'pos': give at least two"),
        ({"pos": 300, "neg": 19}, "319 distinct texts, 19 of them with the label 'neg': give at"),
    ],
)
def test_too_few_texts_are_refused(tmp_path, counts, message):
    path = write(tmp_path / "t.tsv", numbered(counts))
    with pytest.raises(ConfigError, match=f"task.path: .*{message}"):
        LabelledTextFile(path=path).fingerprint()


def test_contradictory_texts_are_named_where_too_few_remain(tmp_path):
    path = write(tmp_path / "t.tsv", [*lines_of(ROWS), *lines_of(("other", t) for _, t in ROWS)])
    with pytest.raises(ConfigError, match=r"has 0 distinct texts \(and 300 with two labels"):
        LabelledTextFile(path=path).fingerprint()


def test_enough_texts_are_accepted(tmp_path):
    path = write(tmp_path / "t.tsv", numbered({"pos": 180, "neg": 20}))
    assert LabelledTextFile(path=path).num_contradictory == 0


@pytest.mark.parametrize(("fraction", "name"), [(0.001, "held-out"), (0.999, "train")])
def test_a_split_that_leaves_no_text_of_a_label_is_refused(path, fraction, name):
    with pytest.raises(ConfigError, match=f"task.held_out_fraction={fraction} leaves no {name}"):
        LabelledTextFile(path=path, held_out_fraction=fraction).fingerprint()


def test_texts_too_short_for_prompts_are_refused(path):
    with pytest.raises(ConfigError, match=r"30 held-out texts .* give 0 prompts .* and 0 others"):
        LabelledTextFile(path=path, prompt_words_min=50, prompt_words_max=50).fingerprint()


def test_the_shortest_prompt_is_no_longer_than_the_longest(path):
    with pytest.raises(ValidationError, match=r"prompt_words_min=5 is above .*_max=4: lower"):
        LabelledTextFile(path=path, prompt_words_min=5)


def test_the_yaml_file_is_the_class_with_its_defaults(path):
    config = OmegaConf.load(CONF / "labelled_text.yaml")
    assert set(config) == {"_target_", *(field.name for field in fields(LabelledTextFile))}
    assert OmegaConf.is_missing(config, "path")
    config.path = path
    assert instantiate(config) == LabelledTextFile(path=path)
