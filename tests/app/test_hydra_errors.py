"""What Hydra and the disk refuse is said in a few lines; test_run.py has the rest, from the command
line."""

import errno
import os
import re
import shlex

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from rlhf_exp.app.hydra_errors import RENAMED, explain
from rlhf_exp.app.run import CONF
from tests.composed import compose


def test_an_error_that_is_not_hydras_is_not_explained():
    assert explain(ValueError("mine"), CONF) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named_with_the_fix(number):
    message = explain(OSError(number, os.strerror(number), "/somewhere/outputs"), CONF)
    assert "/somewhere/outputs" in message
    assert os.strerror(number) in message
    assert "hydra.run.dir=" in message
    assert explain(OSError(errno.ECONNRESET, "reset"), CONF) is None


def explained(word: str) -> str:
    with pytest.raises(HydraException) as caught:
        OverridesParser.create().parse_overrides(["seed=1", word])
    message = explain(caught.value, CONF)
    assert message is not None
    return message


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("#tag", "'#' has to be in quotes"),
        ("a~b", "'~' has to be in quotes"),
        ("größer", "'ö' has to be in quotes"),
        ("a\rb", r"'\r' has to be in quotes"),
        ("a\nb", r"'\n' has to be in quotes"),
        ("don't", '"\'" has to be in quotes'),
        ("a=b", "mismatched input '='"),
        ("[1", "no viable alternative at input '[1'"),
        ("great (film)", "Unknown function 'great'"),
        ("costs ${x", "mismatched input '{'"),
    ],
)
def test_a_value_that_hydra_cannot_read_is_shown_in_quotes(value, reason):
    message = explained(f"task.prefix={value}")
    assert message.startswith(f"task.prefix={value} cannot be read: ")
    assert reason in message
    fix = message.partition("\nif the value is a text, quote it: ")[2]
    if fix.startswith("$"):  # as a shell writes control characters
        word = fix[2:-1].encode().decode("unicode_escape")
    else:
        [word] = shlex.split(fix)
    [override] = OverridesParser.create().parse_overrides([word])
    assert override.value() == value.replace("${", "\\${")


@pytest.mark.parametrize("word", ["seed", "+a"])
def test_a_word_without_a_value_is_told_of_its_form(word):
    assert (
        explained(word)
        == f"{word}: write key=value to set a key, ~key to leave one out; see --help"
    )


@pytest.mark.parametrize("key", ["#x", "größe", "1a", "a..b"])
def test_a_key_that_cannot_be_one_is_named(key):
    assert explained(f"{key}=1").startswith(f"{key!r} is not the name of a key")


def test_secrets_are_not_repeated():
    message = explained("+reward.api_key=hunter#2")
    assert "hunter" not in message
    assert "+reward.api_key=***" in message


def test_half_an_interpolation_is_told_how_to_be_text():
    with (
        hydra.initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.raises(HydraException) as caught,
    ):
        hydra.compose("config", overrides=['task.prefix="costs ${x"'])
    message = explain(caught.value, CONF)
    assert re.match(r"task\.prefix: no viable .*; in a text write \\\$\{ instead of \$\{$", message)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage.kl_target=6"], "stage.kl_target: no such key. It is stage.adaptive_kl_target now"),
        (
            ["stage.target_kl=6"],
            "stage.target_kl: no such key. It is stage.guards.max_approx_kl now",
        ),
        (["stage.kl_budget=6"], "stage.kl_budget: no such key. It is stage.guards.max_kl_sum now"),
        (["stage.dtype=bf16"], "stage.dtype: no such key. It is stage.compute.dtype now"),
        (["stage.gamma=1"], "stage.gamma: no such key. It is stage.estimator.gamma now"),
        (
            ["reference=lora"],
            "reference: no such key. It is finetune=full, last_layers or lora now",
        ),
        (
            ["reference.rank=2"],
            "reference: no such key. It is finetune=full, last_layers or lora now",
        ),
        (
            ["stage.kl_target=6", "seed=2", "stage.gamma=1", "optimizer.bose_lr=1"],
            "stage.kl_target: no such key. It is stage.adaptive_kl_target now\n"
            "stage.gamma: no such key. It is stage.estimator.gamma now\n"
            "optimizer.bose_lr: no such key. Did you mean optimizer.base_lr?",
        ),
        (
            ["stage=classifier", "stage.compile=on"],
            "stage.compile: no such key. It is stage.compute.compile now. The chosen stage does "
            "not have it; these do: stage=ppo",
        ),
        (
            ["stage=classifier", "stage.layout=pack"],
            "stage.layout: no such key. The chosen stage does not have it; these do: stage=sft",
        ),
        (
            ["stage/estimator=leave_one_out", "stage.estimator.gae_lambda=1"],
            "stage.estimator.gae_lambda: no such key. The chosen stage/estimator does not have "
            "it; these do: stage/estimator=gae, stage/estimator=one_step",
        ),
        (
            ["stage/estimator=leave_one_out", "stage.gae_lambda=1"],
            "stage.gae_lambda: no such key. It is stage.estimator.gae_lambda now. The chosen "
            "stage/estimator does not have it; these do: stage/estimator=gae, "
            "stage/estimator=one_step",
        ),
    ],
)
def test_an_old_key_is_told_with_the_new_one(words, told, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(HydraException) as caught:
        compose(*words)
    assert explain(caught.value, CONF) == told


def test_every_group_that_an_experiment_leaves_open_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["experiment=yours", "model=gpt2"]
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(HydraException) as caught:
        compose(*words)
    task, reward = explain(caught.value, CONF).splitlines()
    assert re.fullmatch(r"task is required: choose one: task=arithmetic .* prefix .*", task)
    assert re.fullmatch(r"reward is required: choose one: reward=arithmetic .* judge .*", reward)


@pytest.mark.parametrize("key", RENAMED)
def test_a_renamed_key_leads_to_one_that_there_is(key):
    config, missing = compose(), object()
    new = RENAMED[key].partition("=")[0]
    assert OmegaConf.select(config, new, default=missing) is not missing
    assert OmegaConf.select(config, key, default=missing) is missing
