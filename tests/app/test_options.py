"""What --help and --cfg job --comments say of groups, options and keys."""

import re
from pathlib import Path

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig

from rlhf_exp.app.options import CONF, list_groups, with_comments
from tests.app.test_run import Outcome, train


@pytest.fixture(autouse=True)
def own_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets the folders of a command line when the test ends."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: an option of its own, one that is broken, and one with the name of ours."""
    (tmp_path / "reward").mkdir()
    files = {
        "mine": "_target_: mine.Mine\nweights:\n  kind: 1  # how much kindness counts\n",
        "broken": "_target_: mine.Mine\nkey: [\n",
        "keyword": "_target_: mine.Keyword\n",
    }
    for name, text in files.items():
        (tmp_path / "reward" / f"{name}.yaml").write_text(text)
    return tmp_path


def lines_of(group: str, text: str) -> list[str]:
    """The lines about a group."""
    return re.search(rf"^{group}: .*\n(?:  .*\n?)*", text, re.MULTILINE)[0].splitlines()


def test_help_says_what_a_group_is_for_and_whose_its_options_are(folder, tmp_path):
    out = train(tmp_path, "--help", "--config-dir", str(folder)).out
    head, yours, *ours = lines_of("reward", out)
    assert head == "reward: what scores a completion"
    assert yours == "  yours      broken, mine"
    assert " ".join(" ".join(ours).split()) == (
        "published arithmetic, char_count, classifier, distilbert_imdb, distilbert_imdb_logit,"
        " function, http, judge, judge_chat, judge_scale, keyword, length, pair_model,"
        " pythia_1b_tldr, reward_model, sentences, sentences_and_judge, shuffled, sum, zero"
        " internal artifact_classifier, artifact_reward_model"
    )
    assert lines_of("stage/estimator", out) == [
        "stage/estimator: how rewards become advantages",
        "  published  best_of_group, gae, group_normalized, leave_one_out, one_step,",
        "             reinforce",
    ]
    assert max(map(len, out.splitlines())) <= 80


def test_every_group_has_a_purpose_and_every_option_is_listed_once():
    text = list_groups()
    files = [file for file in CONF.rglob("*/*.yaml") if "hydra" not in file.parts]
    groups = {file.parent.relative_to(CONF).as_posix() for file in files}
    heads = re.findall(r"^([a-z][\w/]*): (\w.*)$", text, re.MULTILINE)
    assert {group for group, _ in heads} == groups
    for group in groups:
        [_, *lines] = re.split(r"  (?:published|internal) ", " ".join(lines_of(group, text)))
        listed = [name.strip() for line in lines for name in line.split(",")]
        assert sorted(listed) == sorted(file.stem for file in CONF.glob(f"{group}/*.yaml"))


def test_the_configuration_is_printed_with_the_comments_of_its_keys(tmp_path):
    plain = train(tmp_path, "--cfg", "job").out
    outcome = train(tmp_path, "--cfg", "job", "--comments")
    assert (outcome.code, outcome.err) == (0, "")
    assert yaml.safe_load(outcome.out) == yaml.safe_load(plain)
    values = [
        line for line in outcome.out.splitlines() if not re.search(r"_target_: |task: \$|:$", line)
    ]
    assert [line for line in values if " # " not in line] == []
    for line in (
        "seed: 1                         # seeds the run's own stage",
        "stage:                          # what the run trains: the policy by PPO, or one of the"
        " models that PPO starts from",
        "  kl_coef: 0.2                  # weight of the KL to the reference (nats a token),"
        " 0.03-3",
        "    max_skipped: 10             # most steps and phases that a run may skip, 0-100",
        "      max_skipped: 10           # most updates that a run may skip, 0-100",
        "    gamma: 1.0                  # discount per token, 0-1",
    ):
        assert line in outcome.out.splitlines()


def test_a_part_of_the_configuration_is_printed_with_comments(folder, tmp_path):
    words = ["--config-dir", str(folder), "reward=mine", "--cfg", "job", "-p", "reward"]
    outcome = train(tmp_path, *words, "--comments")
    assert outcome.out.splitlines() == [
        "# @package reward",
        "_target_: mine.Mine",
        "weights:",
        "  kind: 1                       # how much kindness counts",
    ]


def test_a_value_of_several_lines_keeps_them():
    words = " ".join(["word"] * 40)
    text = yaml.safe_dump({"name": words, "seed": 1, "until": "a\nb\n"}, sort_keys=False)
    commented = with_comments(text, [CONF])
    assert yaml.safe_load(commented) == yaml.safe_load(text)
    assert "word # folder below outputs/" in commented


def test_comments_belong_to_the_printed_configuration(tmp_path):
    outcome: Outcome = train(tmp_path, "--comments")
    assert outcome.code == 2
    assert "--comments is for printing the configuration: add --cfg job" in outcome.err


def test_a_comment_in_an_experiment_is_about_its_value_and_not_shown(folder):
    (folder / "experiment").mkdir()
    own = "stage:\n  weights:\n    kind: 2  # the best of a sweep\n"
    (folder / "experiment" / "mine.yaml").write_text(own)
    text = "stage:\n  _target_: mine.Mine\n  weights:\n    kind: 1\n"
    assert with_comments(text, [folder]).splitlines()[-1] == (
        "    kind: 1                     # how much kindness counts"
    )
