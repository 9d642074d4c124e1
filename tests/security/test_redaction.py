"""Secrets are known by their keys, and nothing repeats them."""

import logging
import re
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from rlhf_exp.security import redaction
from rlhf_exp.security.redaction import (
    NO_SECRETS,
    REDACTED,
    Scrubbing,
    is_secret,
    looks_random,
    redact,
    redact_source,
    redact_words,
    redacted_keys,
    remember,
    remember_environment,
    remember_words,
    scrub,
    scrub_logs,
    scrub_tracebacks,
)

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(redaction, "_secret_texts", set())


@pytest.mark.parametrize(
    "key",
    ["api_key", "hf_token", "password", "client_secret", "API_KEY", "apiKey", "secrets", "tokens",
     "key_of_mine", "reward.terms.judge.openai_api_key", "passwd", "x-api-key"],
)  # fmt: skip
def test_a_key_that_is_named_so_holds_a_secret(key):
    assert is_secret(key)
    assert not is_secret(key, None)
    assert not is_secret(key, True)


@pytest.mark.parametrize(
    "key", ["token_env", "API_KEY_ENV", "tokenizer", "keyword", "max_tokens", "seed"]
)
def test_others_do_not(key):
    assert not is_secret(key)


def test_numbers_are_secret_where_the_key_leaves_no_doubt():
    assert is_secret("password", 1234)
    assert not is_secret("num_tokens", 1234)
    assert not is_secret("key_dim", 64)


def test_no_key_of_our_own_is_taken_for_a_secret():
    def keys(config):
        if isinstance(config, dict):
            for key, value in config.items():
                yield str(key)
                yield from keys(value)

    own = {key for path in CONF.rglob("*.yaml") for key in keys(yaml.safe_load(path.read_text()))}
    assert [key for key in sorted(own) if is_secret(key.rpartition("@")[2])] == []
    assert own >= NO_SECRETS, "one of them is gone"


def test_secrets_of_a_configuration_are_replaced_wherever_they_are():
    config = {
        "stage": {"kl_coef": 0.1, "token_noise": 0.2},
        "reward": {
            "_target_": "mine.Judge",
            "api_key": "hunter-2",
            "api_keys": ["hunter-3", {"a": "hunter-4", "b": {"c": 5}}],
            "keychain": {"_target_": "mine.Chain", "name": "kept", "password": 12345},
            "auth": "Bearer hunter-2",
            "url": "https://host/score?model=m&api_key=hunter-5",
            "token_env": "TOKEN",
            "hf_token": "${oc.env:HF_TOKEN}",
            "other_token": "${oc.env:HF_TOKEN,hunter-6}",
            "empty_token": "",
            "no_key": None,
            "asked_key": "???",
        },
        "task": {"max_tokens": 32, "prefix": ["a key: this"], "names": ("x",)},
    }
    shown = redact(config)
    assert shown == {
        "stage": config["stage"],
        "reward": {
            **config["reward"],
            "api_key": REDACTED,
            "api_keys": [REDACTED, {"a": REDACTED, "b": {"c": REDACTED}}],
            "keychain": {"_target_": "mine.Chain", "name": "kept", "password": REDACTED},
            "auth": REDACTED,
            "url": REDACTED,
            "other_token": REDACTED,
        },
        "task": {"max_tokens": 32, "prefix": ["a key: this"], "names": ["x"]},
    }
    assert redact(shown) == shown
    assert config["reward"]["api_key"] == "hunter-2"
    assert redacted_keys(shown) == [
        "reward.api_key", "reward.api_keys.0", "reward.api_keys.1.a", "reward.api_keys.1.b.c",
        "reward.keychain.password", "reward.auth", "reward.url", "reward.other_token",
    ]  # fmt: skip
    told = scrub(f"no {config['reward']['api_keys']}, hunter-2, hunter-5, {['hunter-4']}")
    assert "hunter" not in told


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("+reward.api_key=hunter2", "+reward.api_key=***"),
        ("++reward.api_key='hunter 2, {and} more'", "++reward.api_key=***"),
        ("reward.password=1234", "reward.password=***"),
        ("reward.api_key=hunter2,hunter3", "reward.api_key=***"),
        ("reward.secrets.openai=hunter2", "reward.secrets.openai=***"),
        ("x={_target_:mine.X,api_key:hunter2,n:3}", "x={_target_:mine.X,api_key:***,n:3}"),
        ("reward={'api_key': 'hunter\\'s 2', n: 3}", "reward={'api_key': ***, n: 3}"),
        ("x.list=[{hf_tokens:[hunter2,hunter3]},{a:1}]", "x.list=[{hf_tokens:***},{a:1}]"),
        ("a={api_key:hunter2", "a={api_key:***"),
        ("reward.url=http://h/?api_key=hunter2&n=1", "reward.url=http://h/?api_key=***&n=1"),
        # What is none stays as it is.
        ("reward.api_key=${oc.env:KEY}", "reward.api_key=${oc.env:KEY}"),
        ("x={api_key:${oc.env:KEY}}", "x={api_key:${oc.env:KEY}}"),
        ("reward.api_key=null", "reward.api_key=null"),
        ("reward.api_key=", "reward.api_key="),
        ("reward.token_env=TOKEN", "reward.token_env=TOKEN"),
        ("task.max_tokens=32,64", "task.max_tokens=32,64"),
        ("mine.num_tokens=32,64", "mine.num_tokens=32,64"),
        ("reward.terms.keyword.weight=2", "reward.terms.keyword.weight=2"),
        ("prepare.key_step.stage.epochs=2", "prepare.key_step.stage.epochs=2"),
        ("-m", "-m"),
        ("~reward.api_key", "~reward.api_key"),
    ],
)  # fmt: skip
def test_words_of_a_command_line_lose_their_secrets(word, shown):
    assert redact_words([word, "seed=1"]) == [shown, "seed=1"]
    assert redact_words([shown]) == [shown]


def test_a_command_line_is_remembered_even_if_it_is_wrong():
    remember_words(
        ["train.py", "reward={_target_:x,api_key:hunter-2", "reward.hf_token=[abcd-1, e5g6"]
    )
    assert scrub("no viable alternative at 'hunter-2' or abcd-1 or e5g6") == (
        "no viable alternative at '***' or *** or ***"
    )


def test_the_environments_secrets_are_remembered(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hNt3r-2!2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "s0m3wh3re")
    monkeypatch.setenv("NO_TOKEN", "true")
    remember_environment()
    assert scrub("/v1/hNt3r-2!2: true s0m3wh3re") == "/v1/***: true s0m3wh3re"


@pytest.mark.parametrize(
    "text",
    ["sk-proj-9fK2mXq7Lw", "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "P@ssw0rd!2024",
     "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", "9f86d081884c7d659a2feaa0c55ad015",
     "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"],
)  # fmt: skip
def test_tokens_and_generated_passwords_look_random(text):
    assert looks_random(text)


@pytest.mark.parametrize(
    "text",
    ["training", "outputs/", "a1b2", "hunter-22", "123456789012", "openai-community/gpt2",
     "meta-llama/Llama-3.2-1B", "/home/me/.ssh/id_ed25519",
     "rlhf_exp.training.schedules.WarmupDecay",
     "outputs/run/2026-11-30_04-00-00-3f9a2c", "0_kl_coef=0.1,seed=2"],
)  # fmt: skip
def test_words_names_and_paths_do_not(text):
    assert not looks_random(text)


@pytest.fixture(scope="module")
def default_config() -> dict:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config"))


def texts_of(config) -> set[str]:
    """The texts in a configuration, keys included, and the words, names and paths in them."""
    if isinstance(config, dict):
        return texts_of([*config, *config.values()])
    if isinstance(config, list):
        return set().union(*map(texts_of, config))
    if not isinstance(config, str):
        return set()
    return {config, *re.split(r"\W+", config), *re.split(r"[^\w/.-]+", config)}


def test_a_variable_with_a_secrets_name_changes_nothing_in_a_configuration(
    default_config, monkeypatch
):
    for number, text in enumerate(sorted(texts_of(default_config) | {"outputs/", "training"})):
        monkeypatch.setenv(f"SERVICE_{number}_TOKEN", text)
    remember_environment()
    assert redact(default_config) == default_config
    path = "outputs/run/2026-11-30_04-00-00-3f9a2c"
    assert scrub(path) == path


@pytest.mark.parametrize(
    "password",
    ["training", "reviews", "outputs", "outputs/", "rlhf_exp", "artifacts",
     "rlhf_exp.training.schedules.WarmupDecay", "reviews/2026"],
)  # fmt: skip
def test_a_weak_secret_takes_nothing_else_from_a_configuration(default_config, password):
    config = {**default_config, "access": {"password": password}}
    assert redact(config) == {**default_config, "access": {"password": REDACTED}}
    path = "rlhf_exp/training of outputs/reviews/2026-11-30 in outputs/artifacts with "
    assert scrub(path + password) == path + REDACTED
    words = ["schedule._target_=rlhf_exp.training.schedules.WarmupDecay", "task.name=reviews"]
    assert redact_words([*words, f"+access.password={password}"]) == [
        *words, f"+access.password={REDACTED}",
    ]  # fmt: skip


def test_names_that_are_secrets_names_by_chance_hide_no_parts():
    config = {
        "terms": {"monkey": {"weight": 2, "reward": {"_target_": "mine.Reward", "n": 3}}},
        "prepare": {"tokens": {"stage": {"_target_": "mine.Stage"}, "seed": 3}},
    }
    assert redact(config) == config


def test_a_value_that_repeats_a_secret_is_redacted_whole():
    remember({"api_key": "hunter-2", "token": "hNt3r-2!2"})
    assert redact_words(["+reward.auth='Bearer hunter-2'", "+a.url=http://h/xhNt3r-2!2/y"]) == [
        f"+reward.auth={REDACTED}", f"+a.url={REDACTED}",
    ]  # fmt: skip
    assert redact_words(["task.path=data/hunter-2.csv"]) == ["task.path=data/hunter-2.csv"]
    assert scrub("line\nhunter-2, 'hunter-2'.") == "line\n***, '***'."


def test_a_secret_is_found_however_it_is_written():
    remember({"password": 'a"b\\c\né/d', "token": "abc-defg", "api_key": "abc-defg-hijk"})
    for text in (
        'a"b\\c\né/d',
        repr('a"b\\c\né/d'),
        '"a\\"b\\\\c\\n\\u00e9/d"',
        "a%22b%5Cc%0A%C3%A9%2Fd",
    ):
        assert scrub(f"<{text}>").strip("<>'\"") == REDACTED
    assert scrub("abc-defg-hijk") == REDACTED, "not the one inside and the rest"


def test_sources_lose_what_is_quoted_or_follows_a_secret_key():
    source = """
+    api_key: str = "hunter2"
+api_key = "hunter2"  # of mine
+    {"hf_token": 'hunter2', "seed": 1, 'password':"hunter\\"2"}
-client_secret: hunter2
 password:  hunter 2
+token_env: TOKEN
+api_key: ${oc.env:KEY}
+rows.sort(key=len)
+tokens = tokenizer(text)"""
    shown = redact_source(source)
    assert "hunter" not in shown
    assert shown.count(REDACTED) == 6
    for kept in (
        "# of mine",
        '"seed": 1',
        "token_env: TOKEN",
        "${oc.env:KEY}",
        "key=len",
        "(text)",
    ):
        assert kept in shown


def test_what_is_too_common_is_not_replaced_in_texts():
    remember({"sort_key": "score", "stop_token": ".", "key_kind": "positive", "password": "score"})
    assert scrub("a positive text.") == "a positive text."
    assert scrub("score") == REDACTED, "as a password it is"


def test_logs_and_tracebacks_are_scrubbed(tmp_path, monkeypatch, capsys):
    remember({"api_key": "hunter-2"})
    handler = logging.FileHandler(tmp_path / "log")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    scrub_logs()
    scrub_logs()
    assert not isinstance(handler.formatter._inner, Scrubbing)
    try:
        raise ValueError("bad hunter-2")
    except ValueError as error:
        root.exception("with %s", "hunter-2")
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        scrub_tracebacks()
        sys.excepthook(type(error), error, error.__traceback__)
    handler.close()
    for text in ((tmp_path / "log").read_text(), capsys.readouterr().err):
        assert "ValueError: bad ***" in text
        assert "hunter" not in text


def test_a_secret_that_begins_with_another_leaves_nothing_behind():
    short, long = "x7Kq2Lm9", "x7Kq2Lm9Zp4Wt8Rv"
    remember({"api_key": short, "password": long})
    assert scrub(f"{long} and {short}") == f"{REDACTED} and {REDACTED}"
