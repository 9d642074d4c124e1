"""Paths and texts of any characters come through a command line as they are."""

import os
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rlhf_exp.app.overrides import PATH_KEYS, command, quote, quote_paths, unquote
from rlhf_exp.app.run import CONF
from rlhf_exp.settings import ConfigError

TEXTS = [
    "outputs/sweeps/0_kl_coef=0.1,seed=2", "#1", "~x", "a@b", "a\rb", "a\nb", "größer", "it's",
    'a"b', "(x)", "[x", "{x: 1}", "a, b", " a ", "1", "null", "1e-4", "a\\", 'a\\"', "\\'", "a!b",
    "a:b", "costs ${x}", "\\${x}", "${", "", "a;b&c|d<e>f`g^h", "range(1,2)", "*", "%",
]  # fmt: skip


def value_of(word: str) -> object:
    """What a configuration holds that the word sets."""
    value = OverridesParser.create().parse_override(word).value()
    return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_quoted_text_is_read_as_it_is(text):
    assert value_of(f"task.prefix={quote(text)}") == text
    assert unquote(quote(text)) == text


def test_a_value_without_quotes_is_its_own_text():
    for value in ("", "a", "'", "'a", 'a"', "auto"):
        assert unquote(value) == value
    assert unquote("'it\\'s'") == "it's"


@pytest.mark.parametrize("name", [text.replace("/", "+") for text in TEXTS if text])
def test_a_path_that_exists_is_read_as_it_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    for key in ("resume", "model.base_model", "reward.path", "+task.path", "hydra.run.dir"):
        for path in (name, str(tmp_path / name)):
            [word] = quote_paths([f"{key}={path}"])
            assert value_of(word) == path
            assert quote_paths([word]) == [word]
    [word] = quote_paths([f"reward.function={name}:score"])
    assert value_of(word) == f"{name}:score"


def test_a_path_that_hydra_cannot_read_is_one_even_if_it_does_not_exist():
    [word] = quote_paths(["resume=outputs/0_kl_coef=0.1"])
    assert value_of(word) == "outputs/0_kl_coef=0.1"


def test_all_else_is_left_to_hydra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").mkdir()
    words = [
        "seed=1", "resume=auto", "resume=null", "task.path=a.csv,b.csv", "task.prefix=#1", "-m",
        "model.base_model=artifact:base", "reward.path=${model.base_model}", "--config-dir=1",
        "~reward", "stage.kl_coef=[1", "resume='a b'",
    ]  # fmt: skip
    assert quote_paths(words) == words


def test_the_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert quote_paths(["task.path=~/a.csv"]) == ["task.path=/home/me/a.csv"]
    assert quote_paths(["task.prefix=~/a.csv"]) == ["task.prefix=~/a.csv"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=1\r", r"^'seed=1\\r' ends with a carriage return.* sed -i 's/\\r\$//' SCRIPT$"),
        (os.fsdecode(b"task.path=a\xff"), r"^'task\.path=a\\udcff' is not UTF-8.*rename the file"),
        ("=5", r"^'=5' names no key: write key=value"),
        ("+@x=5", "names no key"),
        ("~", "names no key"),
        ("", "names no key"),
    ],
)
def test_a_word_that_cannot_be_meant_is_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        quote_paths(["seed=1", word])


@pytest.mark.parametrize("path", ["outputs/0_kl_coef=0.1", "my runs/$HOME/it's"])
def test_a_command_can_be_pasted_into_a_shell(path):
    line = command(f"resume={path}", "seed=1")
    assert shlex.split(line) == ["python", "train.py", f"resume={path}", "seed=1"]


def test_the_keys_of_paths_exist():
    files = "".join(path.read_text(encoding="utf-8") for path in CONF.rglob("*.yaml"))
    for key in PATH_KEYS:
        assert f"{key}: " in files
