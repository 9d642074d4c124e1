from dataclasses import fields
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ValidationError

from rlhf_exp.settings import ConfigError, Fingerprinted
from rlhf_exp.tasks.prefix import Prefix
from rlhf_exp.tasks.protocol import CorpusTask, ShapesPrompts, Task

CONF = Path(__file__).parents[2] / "conf/task"
MANY = [f"prefix {i}" for i in range(20)]


def write(folder: Path, contents: str | bytes) -> str:
    file = folder / "prefixes.txt"
    file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return str(file)


def from_file(path: str, **settings) -> Prefix:
    return Prefix(prefix=None, prefix_file=path, **settings)


def test_every_prompt_is_the_prefix():
    task = Prefix(prefix="Once upon a time", prepend_bos=False)
    assert task.train_prompts() == task.eval_prompts() == ("Once upon a time",)
    assert task.fingerprint() == ""
    assert isinstance(task, Task)
    assert isinstance(task, Fingerprinted)
    assert not isinstance(task, CorpusTask)
    assert not isinstance(task, ShapesPrompts)


def test_a_list_and_a_file_give_the_same_prompts_in_their_order(tmp_path):
    listed = Prefix(prefix=["b", " a ", "b", "c"])
    assert listed.train_prompts() == listed.eval_prompts() == ("b", " a ", "c")
    assert listed.fingerprint() == ""
    path = write(tmp_path, "\ufeffb\r\n\n a \n \t\n\r\nb\nc")
    task = from_file(path)
    assert task.train_prompts() == task.eval_prompts() == ("b", " a ", "c")


def test_a_line_of_a_file_holds_other_breaks(tmp_path):
    assert from_file(write(tmp_path, "a\u2028b\x85c\n")).train_prompts() == ("a\u2028b\x85c",)


def test_a_home_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
    write(tmp_path, "a\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_file("~/prefixes.txt").train_prompts() == ("a",)


def test_the_fingerprint_is_of_the_prefixes_in_the_file(tmp_path):
    first = from_file(write(tmp_path, "a\nb\n")).fingerprint()
    assert len(first) == 64
    assert from_file(write(tmp_path, "a\n\nb\na")).fingerprint() == first
    assert from_file(write(tmp_path, "a\nc\n")).fingerprint() != first
    assert from_file(write(tmp_path, "b\na\n")).fingerprint() != first


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [
        (1, 1.0, 0),
        (4, 0.1, 0),
        (5, 0.1, 1),
        (14, 0.1, 1),
        (15, 0.1, 2),
        (2, 0.5, 1),
        (3, 0.5, 2),
        (20, 0.0, 0),
        (20, 0.02, 0),
    ],
)
def test_a_share_of_several_is_held_out_to_the_nearest(count, fraction, held_out):
    task = Prefix(prefix=MANY[:count], held_out_fraction=fraction)
    kept = task.train_prompts()
    assert len(kept) == count - held_out
    assert task.eval_prompts() == (
        tuple(p for p in MANY[:count] if p not in kept) if held_out else kept
    )
    assert [*kept] == [p for p in MANY if p in kept]
    assert task.fingerprint() == ""


def test_which_are_held_out_looks_random_and_does_not_depend_on_their_order():
    task = Prefix(prefix=MANY, held_out_fraction=0.3)
    for order in (MANY, sorted(MANY)):
        assert set(task.eval_prompts()) not in (set(order[:6]), set(order[-6:]))
    turned = Prefix(prefix=MANY[::-1], held_out_fraction=0.3)
    assert turned.eval_prompts() == task.eval_prompts()[::-1]


def test_a_share_that_leaves_nothing_to_train_on_is_refused():
    task = Prefix(prefix=["a", "b"], held_out_fraction=0.8)
    with pytest.raises(ConfigError) as caught:
        task.fingerprint()
    assert str(caught.value) == (
        "task.held_out_fraction=0.8 leaves no prefix to train on: lower it"
    )


@pytest.mark.parametrize("prefix", ["", [], ["a", ""], [["a"]], 3, ["a", 3]])
def test_what_is_no_prefix_is_refused_in_one_line(prefix):
    with pytest.raises(ValidationError, match="give a text or a list of texts, none of") as caught:
        Prefix(prefix=prefix)
    (detail,) = caught.value.errors()
    assert detail["loc"] == ("prefix",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix": None}, "prefix=None and prefix_file=None: set exactly one, the other null"),
        ({"prefix_file": "a"}, "prefix='This is' and prefix_file='a': set exactly one, the other"),
        ({"prefix": None, "prefix_file": ""}, "at least 1 character"),
        ({"held_out_fraction": 1.1}, "less than or equal to 1"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Prefix(**settings)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", r"prefixes\.txt holds no prefix: give one a line$"),
        ("\n \n\t\r\n", r"prefixes\.txt holds no prefix: give one a line$"),
        (b"caf\xe9\n", r"prefixes\.txt, line 1 is not UTF-8; save the file as UTF-8$"),
    ],
)
def test_a_file_without_prefixes_is_refused(tmp_path, contents, message):
    path = write(tmp_path, contents)
    with pytest.raises(ConfigError, match=message) as caught:
        from_file(path).fingerprint()
    assert str(caught.value).startswith(f"task.prefix_file: {path}")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^task\.prefix_file: cannot read .*none\.txt \(No such"):
        from_file(str(tmp_path / "none.txt")).fingerprint()
    with pytest.raises(ConfigError, match=r"^task\.prefix_file: cannot read .* \(Is a directory\)"):
        from_file(str(tmp_path)).fingerprint()


def test_the_yaml_file_is_the_class_with_its_defaults():
    config = OmegaConf.load(CONF / "prefix.yaml")
    assert set(config) == {"_target_", *(field.name for field in fields(Prefix))}
    assert instantiate(config) == Prefix()
    config.prefix = ["a", "b"]
    assert instantiate(config, _convert_="all") == Prefix(prefix=["a", "b"])
