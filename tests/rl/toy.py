"""Tasks, models and contexts small enough that a run takes a second."""

import functools
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.models import engines
from rlhf_exp.models.finetune import Full
from rlhf_exp.models.interventions import NoIntervention
from rlhf_exp.models.loading import Pretrained, build_policy
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import Reference
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.rl.compute import Compute
from rlhf_exp.rl.estimators import GAE, token_rewards
from rlhf_exp.rl.guards import Guards
from rlhf_exp.rl.histograms import HistogramCollector
from rlhf_exp.rl.phases import Phases
from rlhf_exp.rl.phases import start as start_state
from rlhf_exp.rl.setup import Setup, load_setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.measure import measure
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.settings import settings
from rlhf_exp.stages.held_out import next_token_loss
from rlhf_exp.stages.ppo import PPO, PPOParts
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.stages.sft import SFT
from rlhf_exp.tasks.examples import encode_demonstrations, pad
from rlhf_exp.tasks.protocol import Demonstration, LabelledText, Pair, Split
from rlhf_exp.tasks.tokenizers import word_tokenizer
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import Constant
from rlhf_exp.types import Completions, Experience, Layout, LossOutput, Pass, Rollout

from ..builders import stretch

WORDS = [f"w{i}" for i in range(12)]


@dataclass(frozen=True)
class ToyTask:
    """Prompts of words w0 to w11; texts labelled by whether their first word is a low one."""

    prompts: tuple[str, ...] = ("w0 w1",)
    prepend_bos: bool = True

    def fingerprint(self) -> str:
        return ""

    def train_prompts(self) -> tuple[str, ...]:
        return self.prompts

    def eval_prompts(self) -> tuple[str, ...]:
        return self.prompts

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        return word_tokenizer(WORDS)

    def language_split(self) -> Split:
        return Split(*(tuple(text.text for text in part) for part in self.labelled_split()))

    def labelled_split(self) -> Split:
        texts = [
            LabelledText("low" if a < 6 else "high", f"w{a} w{b} w{a}")
            for a in range(12)
            for b in range(12)
        ]
        random.Random(0).shuffle(texts)
        return Split(train=tuple(texts[36:]), held_out=tuple(texts[:36]))


@dataclass(frozen=True)
class EchoTask(ToyTask):
    """The answer to two words is the first of them, twice after a high second word. Of all 144
    prompts 96 are trained on, 24 held out and 24 evaluated on."""

    def train_prompts(self) -> tuple[str, ...]:
        return self._every()[:96]

    def eval_prompts(self) -> tuple[str, ...]:
        return self._every()[120:]

    def demonstration_split(self) -> Split[Demonstration]:
        every = tuple(Demonstration(prompt, self.answer(prompt)) for prompt in self._every())
        return Split(every[:96], every[96:120])

    def answer(self, prompt: str) -> str:
        first, second = prompt.split()
        return f" {first}" * (2 if int(second[1:]) >= 6 else 1)

    def true_reward(self, prompt: str, completion: str) -> float:
        """The share of the positions of both that are right."""
        pairs = [*itertools.zip_longest(self.answer(prompt).split(), completion.split())]
        return sum(a == b for a, b in pairs) / len(pairs)

    def _every(self) -> tuple[str, ...]:
        every = [f"{a} {b}" for a in WORDS for b in WORDS]
        random.Random(0).shuffle(every)
        return tuple(every)


@settings
class Echoed:
    """The true reward of EchoTask."""

    def load(self, device: torch.device) -> RewardFunction:
        def score(completions: Completions) -> torch.Tensor:
            pairs = zip(completions.prompts.texts, completions.texts, strict=True)
            return torch.tensor([EchoTask().true_reward(*pair) for pair in pairs], device=device)

        return score


@settings
class LowWords:
    """The number of low words of an answer."""

    def load(self, device: torch.device) -> RewardFunction:
        def score(completions: Completions) -> torch.Tensor:
            return torch.tensor([ToyPairs.reward(text) for text in completions.texts])

        return score


@dataclass(frozen=True)
class ToyPairs(ToyTask):
    """Answers of one to four words to prompts of one or two, 40 prompts trained on and 20 held out.
    The reward counts the low words, as the sum of a score a word does."""

    count: int = 240
    rewarded: bool = True

    def pair_split(self) -> Split[Pair]:
        rng = random.Random(1)
        starts = [f"w{a}" for a in range(12)] + [f"w{a} w{b}" for a in range(12) for b in range(4)]
        pairs: list[Pair] = []
        while len(pairs) < self.count:
            answers = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(2)]
            chosen, rejected = sorted(answers, key=self.reward, reverse=True)
            rewards = self.reward(chosen), self.reward(rejected)
            if rewards[0] > rewards[1]:
                ended = rng.random() < 0.5, rng.random() < 0.5
                known = rewards if self.rewarded else (None, None)
                prompt = starts[len(pairs) % 60]
                pairs.append(Pair(prompt, f" {chosen}", f" {rejected}", *known, *ended))
        return Split(
            tuple(pair for pair in pairs if starts.index(pair.prompt) < 40),
            tuple(pair for pair in pairs if starts.index(pair.prompt) >= 40),
        )

    def sources(self) -> Split[str]:
        return Split(*(tuple(f"row {i}" for i in range(len(p))) for p in self.pair_split()))

    @staticmethod
    def reward(text: str) -> float:
        return float(sum(int(word[1:]) < 6 for word in text.split()))


@dataclass(frozen=True)
class OverlappingPairs(ToyPairs):
    """Three of the held-out pairs are trained on too."""

    def pair_split(self) -> Split[Pair]:
        train, held_out = super().pair_split()
        return Split((*train, *held_out[:3]), held_out)


RAGGED = ToyTask(prompts=("w0", "w0 w1 w2", "w3 w4", "w5 w6 w7 w8"))


CPU = torch.device("cpu")


def context(
    path: Path, seed: int = 1, *, resume: bool = False, device: torch.device = CPU
) -> Context:
    return Context(folder=RunFolder(path), seed=seed, device=device, resume=resume)


def parts_of(stage: Stage[Any], **replaced: Any) -> Any:
    """What a stage takes, small."""
    taken = {
        "task": ToyTask(),
        "model": Scratch(num_layers=1, d_model=16, num_heads=2, context_len=16),
        "finetune": Full(),
        "reward": Keyword(keywords=["w7"]),
        "sampler": CachedSampler(gen_len=4),
        "optimizer": AdamWSettings(base_lr=3e-3, head_lr=3e-3),
        "schedule": Constant(),
        "intervention": NoIntervention(),
        **replaced,
    }
    return stage.Parts(**{name: taken[name] for name in stage.parts})


def parts(**replaced: Any) -> PPOParts:
    """What PPO takes, small."""
    return parts_of(PPO(), **replaced)


GROUPS = {"estimator": GAE, "guards": Guards, "compute": Compute}


def ppo_with(base: PPO | None = None, **options: Any) -> PPO:
    """PPO's settings with some changed; those of a group go by their own names: gamma=0.9."""
    base = base or PPO()
    for group, kind in GROUPS.items():
        names = {field.name for field in fields(kind)} & options.keys()
        own = {name: options.pop(name) for name in names}
        if own:
            options[group] = replace(getattr(base, group), **own)
    return replace(base, **options)


def start(
    ppo: PPO, path: Path, *, device: torch.device = CPU, **replaced: Any
) -> tuple[Setup, TrainState]:
    """Setup and state before the first phase."""
    p = parts(**replaced)
    setup = load_setup(
        context(path, device=device),
        p.task,
        p.model,
        p.reward,
        p.sampler,
        p.finetune,
        intervention=p.intervention,
        value_head=ppo.estimator.needs_values,
        separate_values=ppo.value_model == "separate",
    )
    if ppo.value_detach:
        setup.policy.detach_values()
    return setup, start_state(ppo, setup, p.optimizer, p.schedule, seed=1, inputs={})


def collect(ppo: PPO, setup: Setup, state: TrainState) -> Experience:
    """The experience of a rollout of the current weights."""
    prompts = next(state.prompts).repeated(ppo.samples_per_prompt)
    generation = setup.sampler(setup.policy, prompts, state.sample_generator)
    rollout = measure(
        setup.policy,
        setup.reference,
        generation,
        setup.score(generation.completions),
        temperature=setup.sampler.temperature,
    )
    return experience_of(ppo, rollout)


def experience_of(ppo: PPO, rollout: Rollout) -> Experience:
    """What the stage makes of a rollout."""
    rewards = token_rewards(
        rollout, kl_coef=ppo.kl_coef, kl_penalty=ppo.kl_penalty, normalize=ppo.normalize_reward
    )
    return ppo.estimator(rollout, rewards)


def learn(
    ppo: PPO,
    setup: Setup,
    state: TrainState,
    experience: Experience,
    histograms: HistogramCollector | None = None,
) -> Iterator[Mapping[str, Tensor]]:
    """The optimizer steps of a phase; yields the metrics of each minibatch."""
    phases = Phases(ppo, setup, state, Stopwatch())
    phases.histograms = histograms or phases.histograms
    yield from phases.updates(experience)


def loss(
    ppo: PPO,
    setup: Setup,
    experience: Experience,
    *,
    policy: TransformerWithValueHead | None = None,
    layout: Layout | None = None,
) -> LossOutput:
    """The stage's loss of a minibatch, by the policy of the setup or another one."""
    engine = (policy or setup.policy).engine
    layout = layout or Layout.of(experience.rollout.completions)
    new = engine.learning_pass(
        experience.rollout, setup.reference.head, layout, temperature=setup.sampler.temperature
    )
    return ppo.objective(new, experience, ppo.coefficients(ppo.kl_coef))


def textbook_pass(
    policy: TransformerWithValueHead, reference: Reference, rollout: Rollout, *, temperature: float
) -> Pass:
    """The pass from all logits at once, whatever the policy's engine."""
    completions = rollout.completions
    logits, values = policy(*completions.sequences, prompt_len=completions.prompt_len)
    return engines.textbook_pass(logits, values, rollout, reference.head, temperature=temperature)


def fast_pass(
    policy: TransformerWithValueHead,
    reference: Reference,
    rollout: Rollout,
    layout: Layout,
    *,
    temperature: float,
) -> Pass:
    """The fast engine's."""
    engine = engines.FastEngine(policy)
    return engine.learning_pass(rollout, reference.head, layout, temperature=temperature)


def pass_shape(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of what a trunk is called with: ids or their embeddings."""
    given = kwargs["input_ids"] if "input_ids" in kwargs else kwargs["inputs_embeds"]
    return given.shape[0], given.shape[1]


def phase(
    ppo: PPO, setup: Setup, state: TrainState, phases: Phases | None = None
) -> dict[str, float]:
    """The metrics of a phase by itself."""
    phases = phases or Phases(ppo, setup, state, Stopwatch())
    metrics: dict[str, float] = {}
    phases.run(metrics.update)
    return metrics


HALF = 30  # updates of echo_policy
ECHO = Scratch(num_layers=2, d_model=32, num_heads=2, context_len=16)


def train_echo(path: Path, *, seed: int = 1, **options: Any) -> StageResult:
    """The result of SFT on the demonstrations of EchoTask."""
    defaults: dict[str, Any] = {"data": "demonstrations", "epochs": 30, "batch_size": 16}
    stage, optimizer = SFT(**{**defaults, **options}), AdamWSettings(base_lr=1e-2)
    return stage.run(
        context(path, seed), parts_of(stage, task=EchoTask(), model=ECHO, optimizer=optimizer)
    )


@functools.cache
def echo_policy() -> TransformerWithValueHead:
    """A policy that gives some of EchoTask's answers; copy it to change it."""
    policy = build_policy(ECHO, EchoTask().build_tokenizer, device=torch.device("cpu"), seed=0)
    demonstrations = encode_demonstrations(
        policy.tokenizer, EchoTask().demonstration_split().train, prepend_bos=True, limit=16
    )
    adamw = AdamWSettings(base_lr=1e-2).build(policy.language_model)
    for _ in range(HALF):
        loss = next_token_loss(policy.language_model, pad(demonstrations))
        loss.backward()
        adamw.step()
        adamw.zero_grad()
    return policy


def saved_model(path: Path, **shape: Any) -> Pretrained:
    """A language model with weights far from their small initial ones, in a directory."""
    model = Scratch(**{"num_layers": 2, "d_model": 16, "num_heads": 2, "context_len": 16, **shape})
    network, tokenizer = model.language_model(ToyTask().build_tokenizer, seed=0)
    stretch(network, seed=0)
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Pretrained(base_model=str(path))


def rows(path: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """What a run wrote, line by line."""
    return [json.loads(line) for line in (path / name).read_text().splitlines()]
