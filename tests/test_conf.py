"""Every file in conf/ composes, builds what it names, and says what its keys mean."""

import dataclasses
import functools
import inspect
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from rlhf_exp.app import run
from rlhf_exp.app.steps import read_steps
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.runs.config_keys import GROUPS, read_run_settings
from rlhf_exp.stages.protocol import Built
from rlhf_exp.tasks.pairs import write_pairs
from rlhf_exp.tasks.protocol import Pair
from rlhf_exp.tasks.reviews import Reviews

from . import conf_comments
from .composed import compose

CONF = Path(run.CONF)
OPTIONS = sorted(
    path.relative_to(CONF).with_suffix("").as_posix()
    for path in (*CONF.glob("*/*.yaml"), *CONF.glob("stage/*/*.yaml"))
    if path.parent.name != "prepare"  # steps, which experiments are made of
)
PARTS = [option for option in OPTIONS if not option.startswith(("experiment/", "sweep/"))]
EXPERIMENTS = [option.partition("/")[2] for option in OPTIONS if option.startswith("experiment/")]
PPO = [n for n in EXPERIMENTS if n not in ("minilm_sentiment", "dpo", "arithmetic_dpo")]
SMOLLM2 = [name for name in EXPERIMENTS if name.startswith("smollm2_")]
REQUIRED = ["model=gpt2", "task=prefix", "reward=length"]  # by experiment=yours
STEPS = sorted(path.stem for path in CONF.glob("prepare/*.yaml"))
SWEEPS = [option.partition("/")[2] for option in OPTIONS if option.startswith("sweep/")]
SWEEPERS = sorted(path.stem for path in CONF.glob("hydra/sweeper/*.yaml"))
LAUNCHERS = sorted(path.stem for path in CONF.glob("hydra/launcher/*.yaml"))
OF_HYDRA = [f"hydra/sweeper/{name}" for name in SWEEPERS]
OF_HYDRA += [f"hydra/launcher/{name}" for name in LAUNCHERS]

# What a user has to give.
GIVEN = {
    "model.base_model": "DIRECTORY",
    "reward.name": "DIRECTORY",
    "reward.path": "DIRECTORY",
    "reward.function": "json:dumps",
    "reward.url": "http://localhost:8000/score",
    "task.path": "FILE.tsv",
    "intervention.path": "FILE.safetensors",
    "intervention.sites": ["ln_final.hook_out"],
}
# Rewards that a step of `prepare` makes, and the experiments that have such a step.
MADE = {
    "reward/artifact_classifier": {"reviews", "labelled_text"},
    "reward/artifact_reward_model": {"arithmetic"},
    "reward/shuffled": {"reviews", "labelled_text"},
}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    """A file of labelled sentences."""
    rows = Reviews(num_labelled=300, num_held_out=1).labelled_split().train
    path = tmp_path_factory.mktemp("data") / "FILE.tsv"
    path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in rows))
    return path


@pytest.fixture(scope="module")
def texts(sentences) -> Path:
    """A file of prompts, long enough for any experiment."""
    path = sentences.parent / "FILE.jsonl"
    words = " ".join(["it", "was", "a", "film"] * 15)
    rows = [json.dumps({"prompt": f"{i} {words}", "text": f"{i} {words}"}) for i in range(40)]
    path.write_text("\n".join(rows) + "\n")
    write_pairs([Pair(f"{i}", " a", " b") for i in range(40)], path.with_name("PAIRS.jsonl"))
    return path


@pytest.fixture
def data(sentences, texts) -> dict[str, list[str]]:
    """What an experiment is given of files, in place of the user's or the hub's."""
    file = [f"task.path={texts}", "task.eval_split=null"]
    fetched = ["model.fetch=true"]  # so that the models need not be there
    return {
        **dict.fromkeys(SMOLLM2, fetched),
        "minilm_sentiment": [f"task.path={sentences}", *fetched],
        "yours": REQUIRED,
        "labelled_text": [f"task.path={sentences}"],
        "imdb_sentiment_trl": file,
        "tldr": file,
    }


@functools.cache
def compose_hydra(*overrides: str) -> DictConfig:
    """A configuration with Hydra's own part."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides), return_hydra_config=True)


def build_all(overrides: Sequence[str]) -> dict[str, Built]:
    """Each step's stage and parts, by the step's name."""
    config = run.to_container(compose(*overrides))
    read_run_settings(config)
    build = functools.partial(run.instantiate, allowed=run.ALLOWED_TARGETS)
    return {step.name: step.build(build) for step in read_steps(config)}


def load(option: str) -> dict[str, Any]:
    """The file's own keys."""
    content = OmegaConf.to_container(OmegaConf.load(CONF / f"{option}.yaml"))
    return {key: value for key, value in content.items() if key not in ("_target_", "defaults")}


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def among_others(group: str, name: str) -> list[str]:
    """The option, and of each other group the one at its place: few compositions have all."""
    if "/" in group:
        return [f"{group}={name}"]
    options = {g: [o.partition("/")[2] for o in PARTS if o.rpartition("/")[0] == g] for g in GROUPS}
    place = options[group].index(name)
    return [f"{g}={names[place % len(names)]}" for g, names in sorted(options.items()) if names]


@pytest.mark.parametrize("option", PARTS)
def test_an_option_builds_the_class_whose_fields_are_its_keys(option):
    group, name = option.rsplit("/", 1)
    cfg = compose("~experiment", *among_others(group, name))
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, GIVEN[key])
    problems: list[str] = []
    config = OmegaConf.select(OmegaConf.create(run.to_container(cfg)), group.replace("/", "."))
    if group == "logger":
        assert config.pop("also") == []  # of config.yaml, whichever logger is chosen
    built = run.instantiate(
        OmegaConf.to_container(config), group, problems, allowed=run.ALLOWED_TARGETS
    )
    assert problems == []
    assert {field.name for field in dataclasses.fields(built)} == config.keys() - {"_target_"}


@pytest.mark.parametrize(
    "path", conf_comments.options(), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_comments_are_the_docstrings_of_the_fields(path):
    assert conf_comments.written(path) == path.read_text(), "run python -m tests.conf_comments"


@pytest.mark.parametrize("group", sorted({option.partition("/")[0] for option in OPTIONS}))
def test_every_group_has_a_default_that_exists(group):
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    chosen = {key: value for entry in defaults if entry != "_self_" for key, value in entry.items()}
    assert group in chosen
    assert chosen[group] is None or f"{group}/{chosen[group]}" in OPTIONS


def leaves(content: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """The paths of the values that are no mappings."""
    if not isinstance(content, dict):
        yield path
        return
    for key, value in content.items():
        yield from leaves(value, *path, key)


def at(config: Any, path: Sequence[str]) -> Any:
    """The value at a path, None where there is none."""
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_restates_no_default(name, tmp_path):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    own = load(f"experiment/{name}")
    (tmp_path / "experiment").mkdir()
    defaults = yaml.safe_dump({"defaults": yaml.safe_load(text)["defaults"]})
    (tmp_path / "experiment" / "bare.yaml").write_text(f"# @package _global_\n{defaults}")
    chosen = REQUIRED if name == "yours" else []
    words = ["experiment=bare", f"hydra.searchpath=[file://{tmp_path}]"]
    bare, whole = (
        OmegaConf.to_container(compose_hydra(*words, *chosen)),
        OmegaConf.to_container(compose(f"experiment={name}", *chosen)),
    )
    restated = [path for path in leaves(own) if at(bare, path) == at(whole, path) is not None]
    assert restated == []


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_prepare_has_an_optimizer_and_a_schedule_if_its_stage_trains(name):
    config = compose("~experiment", f"+prepare@prepare.own={name}")
    step = OmegaConf.to_container(config)["prepare"]["own"]
    stage = run.instantiate(step["stage"], "stage", [], allowed=run.ALLOWED_TARGETS)
    trains = {"optimizer", "schedule"}
    assert (
        step.keys() & trains == stage.parts & trains == (trains if name != "preferences" else set())
    )


def test_the_default_is_the_reviews_experiment():
    assert compose() == compose("experiment=reviews")


def test_the_keys_that_are_not_groups_are_read_and_described():
    config = run.to_container(compose("~experiment"))
    own = read_run_settings(config)
    assert {field.name for field in dataclasses.fields(own)} | GROUPS == config.keys()
    assert (own.seed, own.prepare_seed, own.allow_targets) == (1, 0, ())


@pytest.mark.parametrize("option", [*PARTS, *OF_HYDRA, "config"])
def test_every_key_has_a_comment(option):
    lines = (CONF / f"{option}.yaml").read_text().splitlines()
    assert re.match(r"# .*[.!]", lines[0]), "the first line says what it is"
    if option == "config":
        lines = lines[lines.index("  - _self_") : lines.index("hydra:")]
    for line in lines:
        if re.match(r"\s*[\w/]+: ", line) and not line.lstrip().startswith("_target_"):
            assert re.search(r"\S\s+# \S", line), line


@pytest.mark.parametrize("name", sorted({*PPO} - {"smollm2_lora"}))  # adapters need the fast one
def test_an_experiment_fits_the_slow_engine_and_sampler_too(name, data):
    chosen = [f"experiment={name}", "model.engine=hooked", "sampler=bridge"]
    chosen += ["stage.compute.gradient_checkpointing=false", *data.get(name, [])]
    _, parts = build_all(chosen)["run"]
    assert parts.model.engine == "hooked"
    assert isinstance(parts.sampler, BridgeSampler)


def commands(path: Path) -> list[list[str]]:
    """The overrides of the commands that a file's header gives."""
    found = []
    for line in path.read_text().splitlines():
        match = re.match(r"# python train\.py((?: \S+)*)", line)
        if match:
            found.append([word for word in shlex.split(match[1]) if word != "-m"])
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_fits_together_by_the_commands_that_it_gives(name, data, monkeypatch, texts):
    monkeypatch.chdir(texts.parent)
    found = commands(CONF / "experiment" / f"{name}.yaml")
    assert found
    for overrides in found:
        assert f"experiment={name}" in overrides or name == "reviews"
        there = {word.partition("=")[0] for word in overrides}
        more = [word for word in data.get(name, []) if word.partition("=")[0] not in there]
        more += ["model.fetch=true"] if "model=smollm2" in overrides else []
        assert [*build_all([*overrides, *more])][-1] == "run"
    assert load(f"experiment/{name}")["name"] == name


def ends(key: str, swept: str) -> list[str]:
    """Values that a key takes in a sweep: all choices or both ends of an interval."""
    [override] = OverridesParser.create().parse_overrides([f"{key}={swept}"])
    assert override.is_sweep_override(), f"{key} is not swept"
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    return [*override.sweep_string_iterator()]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_names_keys_that_there_are_and_values_that_they_take(name):
    sweeper = load(f"sweep/{name}").get("hydra", {}).get("sweeper", {})
    own = sweeper.get("params", {})
    [words] = commands(CONF / "sweep" / f"{name}.yaml")
    if own:
        first, *others = words
        assert first == f"sweep={name}"
        assert compose_hydra(first).hydra.sweeper.params == own
        for variant in sweeper.get("variants", []):
            build_all([*others, *variant])
    else:  # the command line says what is swept
        own = dict(word.split("=") for word in words)
    values = {key: ends(key, str(swept)) for key, swept in own.items()}
    assert values
    for i in (0, -1):
        overrides = [f"{key}={value[i]}" for key, value in values.items()]
        cfg = compose(f"sweep={name}", *overrides)
        for key in values.keys() - GROUPS:
            assert OmegaConf.select(cfg, key) == float(values[key][i])
        build_all(overrides)


def test_a_sweeper_is_chosen_by_the_sweep():
    assert compose_hydra().hydra.sweeper == compose_hydra("hydra/sweeper=grid").hydra.sweeper
    targets = {name: compose_hydra(f"sweep={name}").hydra.sweeper["_target_"] for name in SWEEPS}
    assert targets["grid"] != targets["search"]
    own = {compose_hydra(f"hydra/sweeper={name}").hydra.sweeper["_target_"] for name in SWEEPERS}
    assert {*targets.values()} == own


@pytest.mark.parametrize("name", SWEEPERS)
def test_the_keys_of_a_sweeper_are_those_that_it_reads(name):
    config = compose_hydra(f"hydra/sweeper={name}").hydra.sweeper
    assert config.keys() - {"_target_"} == load(f"hydra/sweeper/{name}").keys()
    read = inspect.signature(get_class(config["_target_"])).parameters
    assert read.keys() == config.keys() - {"_target_"}
    assert hydra.utils.instantiate(config)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_keys_of_a_launcher_are_those_that_it_has(name):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    config = compose_hydra(f"hydra/launcher={name}", "name=mine").hydra.launcher
    keys = load(f"hydra/launcher/{name}")
    assert keys
    # Its own configuration is of a class, so that one that it does not have fails to compose.
    assert {key: config[key] for key in keys} == keys | {"name": "mine"}


def test_imdb_sentiment_has_the_hyperparameters_of_the_notebook():
    # Its RLHFArgs, and for what is not in there the defaults of torch.optim.AdamW.
    stage, parts = build_all(["experiment=imdb_sentiment"])["run"]
    assert (stage.total_phases, stage.batch_size, stage.num_minibatches) == (200, 32, 4)
    assert (stage.batches_per_learning_phase, stage.max_grad_norm) == (2, 1.0)
    assert (stage.clip_coef, stage.vf_coef, stage.ent_coef) == (0.2, 0.15, 0.001)
    assert (stage.kl_coef, stage.kl_penalty, stage.normalize_reward) == (2.5, "loss", True)
    optimizer, schedule, sampler = parts.optimizer, parts.schedule, parts.sampler
    assert (optimizer.base_lr, optimizer.head_lr) == (2e-5, 5e-4)
    assert (optimizer.eps, optimizer.weight_decay) == (1e-8, 0.01)
    assert (schedule.warmup_steps, schedule.final_scale) == (20, 0.1)
    assert (sampler.gen_len, sampler.temperature, sampler.top_k) == (50, 1.0, 10)
    assert (parts.task.prefix, parts.task.prepend_bos) == ("This movie was really", True)
    assert parts.model.base_model == "gpt2-medium"
    assert (parts.reward.name, parts.reward.direction) == ("lvwerra/distilbert-imdb", "pos")


@functools.cache
def by_itself(option: str) -> tuple[list[str], str]:
    """The overrides that choose an option, and the class that it is of."""
    group, name = option.split("/")
    given = [f"{group}={name}"]
    config = compose("~experiment", *given)
    given += [f"{key}={GIVEN[key]}" for key in OmegaConf.missing_keys(config)]
    return given, config[group]["_target_"].rpartition(".")[2]


SWAPPED = [option for option in PARTS if option.startswith(("reward/", "sampler/"))]


def swaps() -> Iterator[Any]:
    """Every experiment with every reward and sampler that it can have; each of them once or twice
    outside of `make soak`."""
    for i, experiment in enumerate(PPO):
        for j, option in enumerate(SWAPPED):
            if experiment in MADE.get(option, {experiment}):
                seldom = (i - j) % min(len(PPO), len(SWAPPED)) and option not in MADE
                yield pytest.param(experiment, option, marks=pytest.mark.soak if seldom else ())


@pytest.mark.parametrize(("experiment", "option"), swaps())
def test_a_reward_or_sampler_can_be_swapped_under_any_experiment(experiment, option, data):
    group = option.partition("/")[0]
    given, chosen = by_itself(option)
    steps = build_all([f"experiment={experiment}", *data.get(experiment, []), *given])
    assert type(getattr(steps["run"][1], group)).__name__ == chosen
