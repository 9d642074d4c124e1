"""The README: its commands compose and check, its example of a reward works, its names exist."""

import functools
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from rlhf_exp.app.run import ALLOWED_TARGETS, CONF, instantiate, to_container
from rlhf_exp.app.steps import read_steps
from rlhf_exp.tasks.pairs import write_pairs
from rlhf_exp.tasks.protocol import Pair
from rlhf_exp.types import Completions, PromptBatch
from tests.app.test_run import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


TRAIN = [
    line.split(" #")[0].strip()
    for block in blocks("bash")
    for line in block.splitlines()
    if "train.py" in line and not line.startswith("make")
] + re.findall(r"`((?:\.venv/bin/)?python train\.py[^`]*)`", README)
# Not in conf/: their own tests are below.
TRAIN = [c for c in TRAIN if "exclamations" not in c and "--config-dir" not in c]
MAKE = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.M)


def sentences(path: Path) -> Path:
    rows = [(label, f"{a} {b} {label} {c}") for label in ("pos", "neg")
            for a in "uvwxyz" for b in "klmno" for c in "abcde"]  # fmt: skip
    path.write_text("label\ttext\n" + "".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8")
    return path


def pairs(path: Path) -> Path:
    write_pairs([Pair(f"prompt {i}", f" good {i}", f" bad {i}") for i in range(100)], path)
    return path


def prompts(path: Path) -> Path:
    path.write_text("".join(f'{{"prompt": "prompt {i}"}}\n' for i in range(50)))
    return path


def rewards(path: Path) -> Path:
    """The example of docs/models_and_data.md."""
    page = (ROOT / "docs" / "models_and_data.md").read_text(encoding="utf-8")
    [source] = re.findall(r"^```python\n(# rewards\.py\n.*?)^```", page, flags=re.M | re.S)
    path.write_text(source)
    return path


@pytest.mark.parametrize("command", TRAIN)
def test_command_composes_and_passes_every_check(command: str, tmp_path: Path) -> None:
    command = command.replace("FILE.tsv", str(sentences(tmp_path / "texts.tsv")))
    command = command.replace("PROMPTS.jsonl", str(prompts(tmp_path / "prompts.jsonl")))
    command = command.replace("rewards.py", str(rewards(tmp_path / "rewards.py")))
    command = command.replace("PAIRS.jsonl", str(pairs(tmp_path / "pairs.jsonl")))
    words = [word for word in shlex.split(command)[2:] if word != "-m"]
    flags = [word for word in words if word.startswith("--")]
    if any(word.startswith("resume=") for word in words):
        assert words == ["resume=RUN"]  # which takes that run's own configuration
        return
    overrides = [
        re.sub(r"=([^=,\[{]+),.*", r"=\1", word) for word in words if "=" in word or word[0] == "~"
    ]
    assert len(flags) + len(overrides) == len(words), "a word that is neither flag nor override"
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = to_container(hydra.compose("config", overrides=overrides))
    build = functools.partial(instantiate, allowed=ALLOWED_TARGETS)
    for step in read_steps(config):
        step.build(build)


def test_there_are_commands() -> None:
    assert len(TRAIN) >= 8
    assert set(MAKE) >= {"run", "test"}


@pytest.mark.parametrize("target", MAKE)
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


def test_the_example_of_a_reward_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [source] = [block for block in blocks("python") if "class Exclamations" in block]
    [config_text] = [block for block in blocks("yaml") if "exclamations" in block]
    (tmp_path / "exclamations.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = yaml.safe_load(config_text)
    config["_target_"] = config["_target_"].removeprefix("rlhf_exp.rewards.")
    problems: list[str] = []
    assert instantiate(config, "reward", problems, allowed=ALLOWED_TARGETS) is None
    assert "allow_targets=[exclamations]" in problems.pop()
    reward = instantiate(config, "reward", problems, allowed=("exclamations.",))
    ones = torch.ones(2, 1, dtype=torch.bool)
    completions = Completions(
        prompts=PromptBatch(
            tokens=ones.long(), mask=ones, rows=({"prompt": "oh!"}, {"prompt": "oh"})
        ),
        tokens=ones.long(),
        mask=ones,
        texts=(" no!", " yes"),
    )
    assert reward.load(torch.device("cpu"))(completions).tolist() == [2.0, 0.0]
    sys.modules.pop("exclamations")


def test_the_commands_with_a_folder_of_ones_own_find_its_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    [block] = [block for block in blocks("bash") if "--config-dir" in block]
    comment, *commands = block.splitlines()
    code, name, option, target = re.fullmatch(
        r"# (\S+) holds a class (\w+) as above, (\S+) the line (_target_: .+)", comment
    ).groups()
    [source] = [block for block in blocks("python") if "(TextReward)" in block]
    (tmp_path / option).parent.mkdir(parents=True)
    (tmp_path / option).write_text(target)
    (tmp_path / code).write_text(re.sub(r"class \w+", f"class {name}", source))
    programs = [shlex.split(command.partition("#")[0]) for command in commands]
    assert [words[:-4] for words in programs] == [[".venv/bin/python", "train.py"], ["rlhf-exp"]]
    for words in programs:
        outcome = train(tmp_path, *words[-4:], "--dry-run")
        assert outcome.code == 0, outcome.err
        assert "all is well" in outcome.out
    del sys.modules["praise"]


def test_every_metric_that_is_logged_is_in_the_glossary() -> None:
    sources = [p.read_text() for p in (ROOT / "rlhf_exp").rglob("*.py")]
    prefixes = "objective|policy|loss|val|sample|eval|time|heldout|train|pairs|warn"
    logged = {m for s in sources for m in re.findall(rf'"((?:{prefixes})/\w+)"', s)}
    assert len(logged) > 20
    missing = {name for name in logged if f"`{name}`" not in README}
    assert not missing


def test_files_and_names_that_are_mentioned_exist() -> None:
    for path in re.findall(r"\]\((docs/[^)]+)\)|`(rlhf_exp/[\w/]+)/?`", README):
        assert (ROOT / (path[0] or path[1])).exists(), path


def test_interpolations_resolve_in_every_experiment() -> None:
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        overrides: list[Any] = [f"experiment={file.stem}"]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose("config", overrides=overrides)
        assert config.name == file.stem
        assert OmegaConf.is_config(config.prepare)


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"@[A-Z]\w*@|TODO|TBD", README)
