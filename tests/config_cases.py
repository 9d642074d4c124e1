"""Configurations drawn at random from the schema of the classes that they name: valid ones, and
ones with one thing wrong.

What a field takes is read from its class, so that a new key is drawn without a change here.
"""

import copy
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from rlhf_exp.rl.compute import Compute
from rlhf_exp.rl.guards import Guards
from rlhf_exp.runs.config_keys import RunSettings
from rlhf_exp.settings import PARTS

# Keys that another key or a file bounds as well, by class. They are drawn one by one only to be
# wrong; AGREEMENTS has what they may be together, CONTRADICTIONS what they may not.
BOUNDED = {
    "PPO": {
        "total_phases", "batch_size", "samples_per_prompt", "num_minibatches",
        "missing_eos_penalty", "adaptive_kl_target", "kl_penalty", "estimator", "objective",
        "guards", "compute",
    },
    "Compute": {
        "rollout_batch_size", "micro_batch_size", "gradient_checkpointing", "compile", "dtype",
        "async_reward",
    },
    "WarmupDecay": {"warmup_steps"},
    "Cosine": {"warmup_steps"},
    "Scratch": {"architecture", "d_model", "num_heads", "context_len", "num_layers", "engine"},
    "ScratchClassifier": {"d_model", "num_heads", "context_len"},
    "Pretrained": {"engine", "attn_implementation", "dtype", "fetch"},
    "Judge": {
        "name", "revision", "device", "template", "examples", "answers", "output", "chat", "system",
        "check",
    },
    "SFT": {"data", "stop_at", "eval_every"},
    "DPO": {"loss", "label_smoothing", "resample_every", "micro_batch_size"},
    "TrainRewardModel": {"head", "unfreeze_layers", "keep_features"},
    "CachedSampler": {"gen_len", "stop_at_eos", "temperature", "top_k", "top_p"},
    "Classifier": {"label", "direction"},
    "HubSettings": {"push", "repo"},
    "PromptDataset": {
        "split", "eval_split", "column", "min_tokens", "max_tokens", "min_chars", "max_prompts",
        "first_tokens_min", "first_tokens_max", "held_out_fraction",
    },
    "LabelledTextFile": {"held_out_fraction", "prompt_words_min", "prompt_words_max"},
    "Prefix": {"prefix", "prefix_file", "held_out_fraction"},
    "PairsFile": {"held_out_fraction"},
    "RunSettings": {
        "until", "resume", "skip_completed", "fail_fast", "gpus", "jobs_per_gpu", "dry_run",
        "device",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """What a field takes."""

    types: frozenset[str]
    choices: tuple[Any, ...]
    low: float | None
    high: float | None
    open_low: bool
    open_high: bool
    nonempty: bool
    required: bool

    @classmethod
    def of(cls, schema: Mapping[str, Any], *, required: bool) -> "Field":
        """The field that a JSON schema describes. Pydantic leaves the ends of a range under their
        Python names where a validator stands before it."""
        parts = schema.get("anyOf", [schema])
        merged = {key: value for part in parts for key, value in part.items()}
        above = merged.get("gt", merged.get("exclusiveMinimum"))
        below = merged.get("lt", merged.get("exclusiveMaximum"))
        return cls(
            types=frozenset(part.get("type", "object") for part in parts),
            choices=tuple(merged.get("enum", (merged["const"],) if "const" in merged else ())),
            low=merged.get("ge", merged.get("minimum")) if above is None else above,
            high=merged.get("le", merged.get("maximum")) if below is None else below,
            open_low=above is not None,
            open_high=below is not None,
            nonempty=merged.get("minLength", 0) > 0,
            required=required,
        )

    @property
    def is_number(self) -> bool:
        """Whether it takes numbers, and nothing else but null."""
        return bool(self.types) and self.types <= {"number", "integer", "null"}

    def valid(self, rng: random.Random, now: Any) -> str | None:
        """A value that it takes, near the one that it has, as a word; None if that is unknown."""
        if "null" in self.types and rng.random() < 0.2:
            return "null"
        if self.choices:
            return str(rng.choice(self.choices))
        if self.types <= {"boolean", "null"}:
            return rng.choice(["true", "false"])
        if not self.is_number:
            return None
        known = now if isinstance(now, int | float) else 1
        low = 0 if self.low is None else self.low
        high = max(low + 3, 2 * known) if self.high is None else self.high
        if "integer" in self.types:
            return str(rng.randint(math.ceil(low), math.floor(high)))
        ends = ([] if self.open_low else [low]) + ([] if self.open_high else [high])
        return repr(float(rng.choice([rng.uniform(low, high) or high, *ends])))

    def out_of_range(self, rng: random.Random) -> str | None:
        """A number or a text of the right type that it does not take; None if it takes all."""
        outside = []
        if self.choices:
            outside.append(f"no_{rng.randint(0, 99)}")
        if self.is_number and self.low is not None:
            below = self.low - rng.randint(0 if self.open_low else 1, 5)
            outside.append(str(below) if "integer" in self.types else repr(float(below)))
        if self.is_number and self.high is not None:
            outside.append(repr(float(self.high + rng.randint(0 if self.open_high else 1, 5))))
        if self.nonempty:
            outside.append("''")
        return rng.choice(outside) if outside else None

    def wrong_type(self, rng: random.Random) -> str | None:
        """A value of a type that it does not take."""
        wrong = ["{a:1}"] if "object" not in self.types else ["[1]", "3"]
        if self.is_number:
            wrong += ["abc", "true", "[1]"]
            wrong += ["1.5", "1e400"] if "number" not in self.types else ["1_0x"]
        elif self.types <= {"boolean", "null"}:
            wrong += ["maybe", "2", "[true]"]
        elif self.types <= {"string", "null"}:
            wrong += ["5", "[a]", "true"]
        if "null" not in self.types:
            wrong.append("null")
        return rng.choice(wrong)

    def not_finite(self, rng: random.Random) -> str | None:
        """NaN or an infinity, if it takes numbers."""
        return rng.choice(["nan", "inf", "-inf"]) if self.is_number else None


@functools.cache
def fields_of(kind: type) -> dict[str, Field]:
    """The fields of a class of settings."""
    schema = pydantic.TypeAdapter(kind).json_schema()
    required = schema.get("required", ())
    properties = schema.get("properties", {})
    return {name: Field.of(one, required=name in required) for name, one in properties.items()}


@dataclass(frozen=True)
class Node:
    """A part of a configuration: where it is, its class, and what it holds."""

    path: str
    kind: type
    content: Mapping[str, Any]

    def key(self, name: str) -> str:
        """The dotted path of one of its keys."""
        return f"{self.path}.{name}".lstrip(".")


class Base:
    """A configuration that is right, and the parts of it that its stages take."""

    def __init__(self, name: str, config: DictConfig) -> None:
        self.name = name
        self.config = config
        self.plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
        self.nodes = [
            *self._step("", self.plain),
            *(
                node
                for step, content in self.plain["prepare"].items()
                for node in self._step(f"prepare.{step}", content)
            ),
            *(self._node(name, self.plain[name]) for name in ("logger", "hub")),
        ]
        own = {name: self.plain[name] for name in fields_of(RunSettings)}
        self.own = Node("", RunSettings, own)

    def _node(self, path: str, content: Mapping[str, Any]) -> Node:
        return Node(path, get_class(content["_target_"]), content)

    def _step(self, path: str, content: Mapping[str, Any]) -> Iterator[Node]:
        # Not built, as a key of another step may be in it: what its class takes is enough.
        stage = self._node(f"{path}.stage".lstrip("."), content["stage"])
        yield stage
        for group, kind in {"guards": Guards, "compute": Compute}.items():
            if group in stage.content:
                yield Node(stage.key(group), kind, stage.content[group])
        for group in ("estimator", "objective"):
            if group in stage.content:
                yield self._node(stage.key(group), stage.content[group])
        for part in PARTS:
            if part in stage.kind.parts and isinstance(
                content.get(part), Mapping
            ):  # else it is that of the run
                yield self._node(f"{path}.{part}".lstrip("."), content[part])

    def at(self, path: str) -> Node | None:
        """The part at a path, if a stage takes it."""
        return next((node for node in self.nodes if node.path == path), None)

    def has(self, path: str, kind: str) -> bool:
        """Whether the part at a path is of a class of that name."""
        node = self.at(path)
        return node is not None and node.kind.__name__ == kind

    def changed(self, words: tuple[str, ...]) -> DictConfig:
        """The configuration with overrides as a command line has them."""
        config = copy.deepcopy(self.config)
        for override in OverridesParser.create().parse_overrides([*words]):
            if override.is_delete():
                parent, _, last = override.key_or_group.rpartition(".")
                with open_dict(config):
                    del OmegaConf.select(config, parent)[last]
            else:
                OmegaConf.update(
                    config, override.key_or_group, override.value(), force_add=override.is_add()
                )
        return config


@dataclass(frozen=True)
class Case:
    """Overrides of a base. If they are wrong, the message begins with one of `named`."""

    base: str
    kind: str
    words: tuple[str, ...]
    named: tuple[str, ...] = ()


def ppo_batches(rng: random.Random) -> tuple[str, ...]:
    """Batches that divide each other."""
    minibatch, count = rng.randint(1, 9), rng.randint(1, 5)
    rows = rng.choice(["null", str(rng.randint(1, minibatch * count))])
    return (
        f"stage.batch_size={minibatch * count}", f"stage.num_minibatches={count}",
        f"stage.compute.rollout_batch_size={rows}",
        f"stage.compute.micro_batch_size={rng.choice(['null', str(rng.randint(1, minibatch))])}",
    )  # fmt: skip


def phases(rng: random.Random) -> tuple[str, ...]:
    """Phases, and a warm-up that is shorter."""
    total = rng.randint(2, 500)
    return f"stage.total_phases={total}", f"schedule.warmup_steps={rng.randint(0, total - 1)}"


Draw = Callable[[random.Random], tuple[str, ...]]
Applies = Callable[[Base], bool]


def is_ppo(base: Base) -> bool:
    """Whether the run's own stage is PPO."""
    return base.has("stage", "PPO")


def has_schedule(base: Base) -> bool:
    """Whether PPO's rate warms up."""
    return is_ppo(base) and base.has("schedule", "WarmupDecay")


def has_cache(base: Base) -> bool:
    """Whether PPO samples by the sampler that computes in any precision."""
    return is_ppo(base) and base.has("sampler", "CachedSampler")


def has_step(kind: str, part: str) -> Applies:
    """Whether the run or a step of its `prepare` is on a part of that class."""
    return lambda base: base.has(part, kind)


AGREEMENTS: tuple[tuple[Applies, Draw], ...] = (
    (is_ppo, ppo_batches),
    (has_schedule, phases),
    (has_cache, lambda rng: (f"stage.compute.dtype={rng.choice(['fp32', 'auto', 'bf16'])}",)),
    (has_cache, lambda rng: (f"sampler.temperature={rng.uniform(0.5, 1)}",
                             f"sampler.top_k={rng.randint(1, 50)}")),
    (is_ppo, lambda rng: (f"stage.compute.compile={rng.choice(['on', 'off', 'auto'])}",
                          "stage.compute.gradient_checkpointing=false")),
    (is_ppo, lambda rng: (f"stage.missing_eos_penalty={rng.uniform(0, 9)}",
                          "sampler.stop_at_eos=true")),
    (is_ppo, lambda rng: (f"stage.kl_penalty={rng.choice(['loss', 'reward', 'return'])}",
                          "stage.estimator.whiten_advantages=none")),
    (has_step("Scratch", "model"), lambda rng: (f"model.num_heads={(h := rng.randint(1, 6))}",
                                                f"model.d_model={h * 4 * rng.randint(1, 9)}")),
    (has_step("TrainRewardModel", "stage"),
     lambda rng: (f"stage.unfreeze_layers={rng.randint(0, 2)}", "stage.keep_features=false",
                  f"stage.head={rng.choice(['token_sum', 'last_token'])}")),
    (has_step("DPO", "stage"),
     lambda rng: ("stage.loss=dpo", f"stage.label_smoothing={rng.uniform(0, 0.49)}")),
    (has_step("DPO", "stage"), lambda rng: (f"stage.batch_size={(n := rng.randint(1, 9))}",
                                            f"stage.micro_batch_size={rng.randint(1, n)}")),
    (has_step("PromptDataset", "task"),
     lambda rng: (f"task.min_tokens={(low := rng.randint(1, 9))}",
                  f"task.max_tokens={low + rng.randint(0, 90)}")),
)  # fmt: skip

Wrong = Callable[[random.Random], tuple[tuple[str, ...], tuple[str, ...]]]
CONTRADICTIONS: tuple[tuple[Applies, Wrong], ...] = (
    (is_ppo, lambda rng: ((f"stage.batch_size={(m := rng.randint(2, 9)) * rng.randint(1, 9) + 1}",
                           f"stage.num_minibatches={m}"), ("stage: batch_size",))),
    (is_ppo, lambda rng: ((f"stage.compute.rollout_batch_size={rng.randint(2000, 9999)}",),
                          ("stage: compute.rollout_batch_size",))),
    (is_ppo, lambda rng: ((f"stage.compute.micro_batch_size={rng.randint(2000, 9999)}",),
                          ("stage: compute.micro_batch_size",))),
    (has_schedule, lambda rng: ((f"stage.total_phases={(n := rng.randint(1, 50))}",
                                 f"schedule.warmup_steps={n + rng.randint(0, 9)}"),
                                ("schedule.warmup_steps",))),
    (is_ppo, lambda rng: (("stage.compute.compile=on", "stage.compute.gradient_checkpointing=true"),
                          ("stage.compute.compile",))),
    (is_ppo, lambda rng: (("model.engine=hooked", "stage.compute.gradient_checkpointing=false",
                           f"stage.compute.{rng.choice(['compile=on', 'dtype=bf16'])}"),
                          ("stage.compute.compile", "stage.compute.dtype"))),
    (is_ppo, lambda rng: ((f"stage.missing_eos_penalty={rng.uniform(0, 9)}",
                           "sampler.stop_at_eos=false"),
                          ("stage.missing_eos_penalty", "sampler.stop_at_eos"))),
    (is_ppo, lambda rng: (("stage.kl_penalty=return", "stage.estimator.whiten_advantages="
                           + rng.choice(["batch", "minibatch"])), ("stage: kl_penalty",))),
    (has_step("Pretrained", "model"),
     lambda rng: ((f"model.base_model=artifact:no_{rng.randint(0, 99)}",), ("model.base_model",))),
    (has_step("Scratch", "model"),
     lambda rng: ((f"model.d_model={(h := rng.randint(2, 9)) * 8 + 1}", f"model.num_heads={h}"),
                  ("model: d_model",))),
    (has_step("Classifier", "reward"),
     lambda rng: (("reward.label=a", "reward.direction=pos"), ("reward: label",))),
    (has_step("Prefix", "task"),
     lambda rng: (("task.prefix=null", "task.prefix_file=null"), ("task: prefix",))),
    (has_step("PromptDataset", "task"),
     lambda rng: ((f"task.min_tokens={(n := rng.randint(5, 99))}", f"task.max_tokens={n - 3}"),
                  ("task: min_tokens",))),
    (has_step("PromptDataset", "task"),
     lambda rng: (("task.first_tokens_min=2", "task.first_tokens_max=null"),
                  ("task: first_tokens_min",))),
    (has_step("TrainRewardModel", "stage"),
     lambda rng: ((f"stage.unfreeze_layers={rng.randint(1, 9)}", "stage.keep_features=true"),
                  ("stage: unfreeze_layers",))),
    (has_step("TrainRewardModel", "stage"),
     lambda rng: (("stage.head=classifier", f"stage.width={rng.randint(1, 99)}"),
                  ("stage: head",))),
    (has_step("BestOfN", "stage"),
     lambda rng: ((f"sampler.{(key := rng.choice(['temperature', 'top_p']))}={rng.random()}",),
                  (f"sampler.{key}",))),
    (lambda base: base.has("stage", "DPO") and base.at("reward") is None,
     lambda rng: ((f"stage.resample_every={rng.randint(1, 99)}",), ("stage.resample_every",))),
    (has_step("DPO", "stage"),
     lambda rng: (("stage.loss=ipo", f"stage.label_smoothing={rng.uniform(0.01, 0.4)}"),
                  ("stage: label_smoothing",))),
    (has_step("DPO", "stage"), lambda rng: ((f"stage.micro_batch_size={rng.randint(2000, 9999)}",),
                                            ("stage: micro_batch_size",))),
    (has_step("SFT", "stage"), lambda rng: ((f"stage.stop_at={rng.uniform(0.1, 0.9)}",
                                             "stage.eval_every=null"), ("stage: stop_at",))),
    (lambda base: True, lambda rng: ((f"until=none_{rng.randint(0, 99)}",), ("until",))),
    (lambda base: True, lambda rng: (("skip_completed=true",), ("skip_completed",))),
    (lambda base: True, lambda rng: (("hub.push=true", "hub.repo=null"), ("hub: push",))),
)  # fmt: skip


def field_wrong(how: str) -> Callable[[random.Random, Base], Case | None]:
    """Draws a field and a value that it does not take."""

    def draw(rng: random.Random, base: Base) -> Case | None:
        node = rng.choice([*base.nodes, base.own])
        fields = fields_of(node.kind)
        if not fields:
            return None
        name = rng.choice(sorted(fields))
        value = getattr(fields[name], how)(rng)
        key = node.key(name)
        return value and Case(base.name, how, (f"{key}={value}",), (key,))

    return draw


def is_required(base: Base, node: Node) -> bool:
    """Whether it is a stage or a part that its stage cannot do without."""
    place, _, part = node.path.rpartition(".")
    stage = base.at(f"{place}.stage".lstrip("."))
    return part == "stage" or (
        part in PARTS and stage is not None and part not in stage.kind.optional_parts
    )


def missing(rng: random.Random, base: Base) -> Case | None:
    """A key that is needed and left out, or a part."""
    keys = [
        word
        for node in base.nodes
        for name, one in fields_of(node.kind).items()
        if one.required
        for word in (f"{node.key(name)}='???'", f"~{node.key(name)}")
    ]
    words = [f"{node.path}=null" for node in base.nodes if is_required(base, node)]
    word = rng.choice(keys * 3 + words + [f"~{name}" for name in fields_of(RunSettings)])
    return Case(base.name, "missing", (word,), (word.lstrip("~").partition("=")[0],))


def unknown_key(rng: random.Random, base: Base) -> Case:
    """A key that there is not."""
    node = rng.choice([*base.nodes, base.own])
    key = node.key(f"{rng.choice(['kl_ceof', 'batchsize', 'lr', 'x'])}_{rng.randint(0, 99)}")
    return Case(base.name, "unknown key", (f"+{key}={rng.choice(['1', 'a', 'null'])}",), (key,))


def wrong_class(rng: random.Random, base: Base) -> Case:
    """A class that is foreign, that there is not, or that is for another part."""
    nodes = [node for node in base.nodes if "_target_" in node.content]
    node = rng.choice(nodes)
    others = [n for n in nodes if n.path.rpartition(".")[2] != node.path.rpartition(".")[2]]
    other = rng.choice(others).content["_target_"]
    here = f"{node.kind.__module__}."
    target = rng.choice([
        "os.system", "shutil.rmtree", "builtins.eval", "rlhf_exp.app.run.shutil.rmtree",
        f"{here}No{rng.randint(0, 99)}", "rlhf_exp.app.run.main_", other, other,
    ])  # fmt: skip
    return Case(base.name, "wrong class", (f"{node.path}._target_={target}",), (node.path,))


def bad_interpolation(rng: random.Random, base: Base) -> Case | None:
    """An interpolation that leads nowhere or cannot be read."""
    node = rng.choice(base.nodes)
    names = sorted(fields_of(node.kind))
    if not names:
        return None
    key = node.key(rng.choice(names))
    value = rng.choice(["${nothing.there}", "${stage.nothing}", "${nothing:1}", "${name}x${no}"])
    return Case(base.name, "bad interpolation", (f"{key}='{value}'",), (key,))


def contradiction(rng: random.Random, base: Base) -> Case:
    """Keys that exclude each other."""
    draw = rng.choice([draw for applies, draw in CONTRADICTIONS if applies(base)])
    words, named = draw(rng)
    return Case(base.name, "contradiction", words, named)


KINDS = (
    field_wrong("wrong_type"), field_wrong("out_of_range"), field_wrong("not_finite"),
    missing, unknown_key, wrong_class, bad_interpolation, contradiction,
)  # fmt: skip


def invalid_cases(rng: random.Random, bases: list[Base], count: int) -> list[Case]:
    """So many different ones with one thing wrong, of every kind and every base in turn."""
    cases: dict[tuple[str, tuple[str, ...]], Case] = {}
    turn = 0
    while len(cases) < count:
        base = bases[turn % len(bases)]
        kind = KINDS[(turn % len(bases) + turn // len(bases)) % len(KINDS)]
        case = kind(rng, base)
        if case is not None:
            cases.setdefault((case.base, case.words), case)
        turn += 1
    return [*cases.values()]


def valid_case(rng: random.Random, base: Base) -> Case:
    """One to five keys with values that they take, and now and then some that agree."""
    words: dict[str, str] = {}
    agreements = [draw for applies, draw in AGREEMENTS if applies(base)]
    if agreements and rng.random() < 0.5:
        for word in rng.choice(agreements)(rng):
            words[word.partition("=")[0]] = word
    for _ in range(rng.randint(1, 5)):
        node = rng.choice([*base.nodes, base.own])
        free = sorted(fields_of(node.kind).keys() - BOUNDED.get(node.kind.__name__, set()))
        if free:
            name = rng.choice(free)
            value = fields_of(node.kind)[name].valid(rng, node.content.get(name))
            if value is not None:
                words.setdefault(node.key(name), f"{node.key(name)}={value}")
    return Case(base.name, "valid", tuple(words.values()))


def valid_cases(rng: random.Random, bases: list[Base], count: int) -> list[Case]:
    """So many different ones, of every base in turn."""
    cases: dict[tuple[str, tuple[str, ...]], Case] = {}
    turn = 0
    while len(cases) < count:
        case = valid_case(rng, bases[turn % len(bases)])
        if case.words:
            cases.setdefault((case.base, case.words), case)
        turn += 1
    return [*cases.values()]
