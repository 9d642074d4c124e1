"""The keys that are not groups are checked together, unknown ones included."""

import pytest

from rlhf_exp.app.run_settings import GROUPS, read_run_settings
from rlhf_exp.settings import ConfigError

CONFIG = {
    "name": "run",
    "seed": 1,
    "prepare_seed": 0,
    "device": "auto",
    "artifacts_dir": "outputs/artifacts",
    "allow_targets": ["mine"],
    "prepare": {"base": {"stage": {"epochs": 2}}},
    "until": None,
    "resume": None,
    "resume_with": ["stage.kl_coef"],
    "max_minutes": None,
    "skip_completed": False,
    "dry_run": True,
}


def test_groups_are_left_to_others():
    own = read_run_settings({**CONFIG, **dict.fromkeys(GROUPS, "anything")})
    assert (own.name, own.seed, own.allow_targets, own.dry_run) == ("run", 1, ("mine",), True)
    assert own == read_run_settings(CONFIG)


@pytest.mark.parametrize("key", sorted(CONFIG))
def test_every_key_is_required(key):
    rest = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(ConfigError, match=rf"^{key}: is required$"):
        read_run_settings(rest)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "a/b"),
        ("name", "../up"),
        ("seed", -1),
        ("seed", True),
        ("prepare_seed", 0.5),
        ("device", ""),
        ("artifacts_dir", ""),
        ("allow_targets", "mine"),
        ("prepare", {"base": None}),
        ("until", ""),
        ("resume_with", "stage.kl_coef"),
        ("max_minutes", 0),
        ("max_minutes", float("nan")),
        ("skip_completed", "perhaps"),
        ("dry_run", None),
    ],
)
def test_a_bad_value_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"^{key}[.\w]*="):
        read_run_settings({**CONFIG, key: value})


def test_everything_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        read_run_settings({**CONFIG, "seed": -1, "name": "", "sead": 2})
    lines = str(caught.value).splitlines()
    assert [line.partition("=")[0].partition(":")[0] for line in lines] == ["name", "sead", "seed"]
    assert "sead: no such key" in lines
