"""The README and the pages that have no test of their own: commands compose and check, examples
work, names exist."""

import functools
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from rlhf_exp.app.run import ALLOWED_TARGETS, CONF, instantiate, to_container
from rlhf_exp.app.steps import read_steps
from rlhf_exp.models.known import KNOWN
from rlhf_exp.tasks.pairs import write_pairs
from rlhf_exp.tasks.protocol import Pair
from rlhf_exp.types import Completions, PromptBatch
from tests.app.test_run import train
from tests.composed import compose
from tests.rl.toy import rows
from tests.test_floors import FLOORS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
PAGES = {
    "README.md": README,
    **{name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md",)},
    **DOCS,
}
WITH_OWN_TEST = {"from_arena.md", "from_trl.md", "interventions.md", "sweeps.md"}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.M | re.S)


def lines(page: str) -> list[str]:
    """The commands of a page's blocks, without comments."""
    text = "".join(blocks("bash", page)).replace("\\\n", " ")
    commands = [line.split(" #")[0].strip() for line in text.splitlines()]
    return [command for command in commands if command and not command.startswith("#")]


def train_commands() -> list[str]:
    commands = []
    for name in PAGES.keys() - WITH_OWN_TEST:
        commands += [line for line in lines(PAGES[name]) if "train.py" in line]
        commands += re.findall(r"`([^`\n]*python train\.py[^`\n]*)`", PAGES[name])
    # Not in conf/: the examples of a reward have tests of their own.
    return sorted(
        {
            c.removeprefix("srun ")
            for c in commands
            if "word_count" not in c and "--config-dir" not in c
        }
    )


TRAIN = train_commands()
MAKE = sorted({name for page in PAGES.values() for name in re.findall(r"`make (\w+)`", page)}
              | {*re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.M)})  # fmt: skip
SCRIPTS = sorted(
    {
        line
        for page in PAGES.values()
        for line in lines(page)
        if re.search(r"scripts/|benchmarks/", line)
    }
)


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


def look(path: Path) -> Path:
    """The example of docs/inside.md."""
    [source] = [block for block in blocks("python", DOCS["inside.md"]) if "# look.py" in block]
    path.write_text(source)
    return path


@pytest.mark.parametrize("command", TRAIN)
def test_command_composes_and_passes_every_check(command: str, tmp_path: Path) -> None:
    command = command.replace("FILE.tsv", str(sentences(tmp_path / "texts.tsv")))
    command = command.replace("PROMPTS.jsonl", str(prompts(tmp_path / "prompts.jsonl")))
    command = command.replace("rewards.py", str(rewards(tmp_path / "rewards.py")))
    command = command.replace("look.py", str(look(tmp_path / "look.py")))
    command = command.replace("task.path=RUN", "task.path=PAIRS.jsonl")
    command = command.replace("PAIRS.jsonl", str(pairs(tmp_path / "pairs.jsonl")))
    words = [word for word in shlex.split(command)[2:] if word != "-m"]
    flags = [word for word in words if word.startswith("--")]
    words = [word for word in words if not word.startswith(("resume=", "hydra."))]
    if "--cfg" in flags:
        words.remove("job")
    overrides = [
        re.sub(r"=([^=,\[{]+),.*", r"=\1", word) for word in words if "=" in word or word[0] == "~"
    ]
    assert len(flags) + len(overrides) == len(words), "a word that is neither flag nor override"
    composed = compose(*overrides)
    if composed.model.base_model in KNOWN:
        composed.model.fetch = True  # so that the model need not be there
    config = to_container(composed)
    build = functools.partial(instantiate, allowed=ALLOWED_TARGETS)
    for step in read_steps(config):
        step.build(build)


def test_there_are_commands() -> None:
    assert len(TRAIN) >= 25
    assert set(MAKE) >= {"run", "test", "docs", "soak", "venv"}
    assert len(SCRIPTS) >= 6


@pytest.mark.parametrize("target", MAKE)
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_script_has_the_options_that_a_page_gives_it(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.match(r"\w+=", word)]
    file = next(word for word in words if word.startswith(("scripts/", "benchmarks/")))
    source = (ROOT / file).read_text(encoding="utf-8")
    options = [word for word in words if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in source] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_run_as_they_are_printed_after_make_venv(page: str) -> None:
    text = re.sub(r"^```python\n.*?^```", "", PAGES[page], flags=re.M | re.S)
    assert re.findall(r"(?<![\w/])python (?:-m |train\.py|scripts/|benchmarks/)", text) == []


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 150
    assert max(map(len, README.splitlines())) <= 400


def test_the_families_of_models_are_those_of_the_table() -> None:
    """The README's table is a summary of the one in docs/models_and_data.md."""
    page = DOCS["models_and_data.md"]
    table = {
        name: ("refused", "", "")
        if runs.startswith("refused")
        else (runs.partition(",")[0], lora, hooked)
        for name, runs, *_, lora, hooked in (
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in page.partition("| architecture |")[2].partition("\n\n")[0].splitlines()[2:]
        )
    }
    assert len(table) > 50
    summary = README.partition("| model families |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(summary) >= 4
    for line in summary:
        families, *answers = [cell.strip() for cell in line.split("|")[1:-1]]
        for name in re.findall(r"`(\w+)`", families):
            assert table[name] == tuple(answers), name


@pytest.fixture
def word_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The example of a reward, its class in an importable file and its YAML in options/."""
    [source] = [block for block in blocks("python") if "class WordCount" in block]
    [config_text] = [block for block in blocks("yaml") if "word_count" in block]
    assert source in DOCS["own_reward.md"]
    assert config_text in DOCS["own_reward.md"]
    (tmp_path / "word_count.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "word_count", raising=False)
    config_text = config_text.replace("rlhf_exp.rewards.", "")
    (tmp_path / "options" / "reward").mkdir(parents=True)
    (tmp_path / "options" / "reward" / "word_count.yaml").write_text(config_text)
    return yaml.safe_load(config_text)


def test_the_example_of_a_reward_scores(word_count: dict[str, Any]) -> None:
    problems: list[str] = []
    assert instantiate(word_count, "reward", problems, allowed=ALLOWED_TARGETS) is None
    assert "allow_targets=[word_count]" in problems.pop()
    reward = instantiate(word_count, "reward", problems, allowed=("word_count.",))
    ones = torch.ones(2, 1, dtype=torch.bool)
    completions = Completions(
        prompts=PromptBatch(
            tokens=ones.long(), mask=ones, rows=({"prompt": "my family"}, {"prompt": "my"})
        ),
        tokens=ones.long(),
        mask=ones,
        texts=(" and family", " families"),
    )
    assert reward.load(torch.device("cpu"))(completions).tolist() == [2.0, 0.0]


def test_a_reward_in_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    page = DOCS["own_reward.md"]
    [block] = [block for block in blocks("bash", page) if "--config-dir" in block]
    comment, *commands = block.splitlines()
    code, name, option, target = re.fullmatch(
        r"# (\S+) holds a class (\w+) as above, (\S+) the line (_target_: .+)", comment
    ).groups()
    [source] = [block for block in blocks("python", page) if "WordCount(TextReward)" in block]
    (tmp_path / option).parent.mkdir(parents=True)
    (tmp_path / option).write_text(target)
    (tmp_path / code).write_text(re.sub(r"class \w+", f"class {name}", source))
    programs = [shlex.split(command.partition("#")[0]) for command in commands]
    assert [words[:-5] for words in programs] == [[".venv/bin/python", "train.py"], ["rlhf-exp"]]
    for words in programs:
        outcome = train(tmp_path, *words[-5:], "--dry-run")
        assert outcome.code == 0, outcome.err
        assert "all is well" in outcome.out
    del sys.modules["praise"]


def test_the_example_of_a_reward_rises_on_the_default_task(
    word_count: dict[str, Any], tmp_path: Path
) -> None:
    """With a policy from nothing in place of the one that the default run pretrains."""
    outcome = train(
        tmp_path, "~experiment", "model=tiny", "task=reviews", "reward=word_count",
        "allow_targets=[word_count]", f"hydra.searchpath=[file://{tmp_path}/options]",
        "logger=local", "stage.kl_coef=0", "stage.total_phases=8", "stage.eval_samples=64",
        "stage.eval_every=8", "optimizer.base_lr=1e-2", "hydra.run.dir=run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    scores = [row["eval/score"] for row in rows(tmp_path / "run") if "eval/score" in row]
    assert scores[-1] > scores[0] + 1


def test_every_metric_that_is_logged_is_in_the_glossary() -> None:
    sources = [p.read_text() for p in (ROOT / "rlhf_exp").rglob("*.py")]
    prefixes = "objective|policy|loss|val|sample|eval|time|heldout|train|pairs|warn|rewards|logps"
    logged = {m for s in sources for m in re.findall(rf'"((?:{prefixes})/\w+)"', s)}
    assert len(logged) > 20
    missing = {name for name in logged if f"`{name}`" not in METRICS}
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_that_a_page_names_exist(page: str) -> None:
    text = PAGES[page]
    folder = ROOT / "docs" if page in DOCS else ROOT
    for path in re.findall(r"\]\(([\w./]+\.(?:md|png))", text):
        generated = folder / path == ROOT / "docs" / "keys.md"
        assert generated or (folder / path).exists(), path
    for path in re.findall(r"`((?:rlhf_exp|tests|scripts|benchmarks)/[\w/.]+?)/?`", text):
        assert "NAME" in path or (ROOT / path).exists(), path


def test_equations_name_functions_that_exist() -> None:
    page = DOCS["algorithm.md"]
    names = set(re.findall(r"\b((?:functional|rl)\.\w+\.\w+)", page))
    assert len(names) >= 12
    for name in names:
        module, _, function = name.rpartition(".")
        path = ROOT / "rlhf_exp" / f"{module.replace('.', '/')}.py"
        assert f"\ndef {function}(" in path.read_text(encoding="utf-8"), name


def test_the_floors_of_the_design_are_those_that_a_test_holds() -> None:
    [diagram] = re.findall(r"^```\n(train\.py.*?)^```", DOCS["design.md"], flags=re.M | re.S)
    floors = [re.split(r" {3,}| (?=equations)", line)[0] for line in diagram.splitlines()[2:]]
    assert [set(floor.replace(".py", "").split()) for floor in reversed(floors)] == FLOORS


def test_interpolations_resolve_in_every_experiment() -> None:
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        required = ["model=gpt2", "task=prefix", "reward=length"] if file.stem == "yours" else []
        config = compose(f"experiment={file.stem}", *required)
        assert config.name == file.stem
        assert OmegaConf.is_config(config.prepare)


def test_nothing_is_left_to_fill_in() -> None:
    for page in PAGES.values():
        assert not re.findall(r"@[A-Z]\w*@|TODO|TBD", page)
