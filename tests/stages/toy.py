"""A task, models and contexts small enough that a PPO run takes a second."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.ppo import PPO, Actors, load_actors
from rlhf_exp.stages.train_state import TrainState
from rlhf_exp.tasks.protocol import LabelledText, Split
from rlhf_exp.tasks.tokenizers import word_tokenizer
from rlhf_exp.training.context import Context
from rlhf_exp.training.folder import RunFolder
from rlhf_exp.training.optim import AdamWSettings, Constant

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
        return self.labelled_split()

    def labelled_split(self) -> Split:
        texts = [
            LabelledText("low" if a < 6 else "high", f"w{a} w{b} w{a}")
            for a in range(12)
            for b in range(12)
        ]
        random.Random(0).shuffle(texts)
        return Split(train=tuple(texts[36:]), held_out=tuple(texts[:36]))


RAGGED = ToyTask(prompts=("w0", "w0 w1 w2", "w3 w4", "w5 w6 w7 w8"))


def context(path: Path, seed: int = 1) -> Context:
    return Context(folder=RunFolder(path), seed=seed, device=torch.device("cpu"))


def parts(**replaced: Any) -> dict[str, Any]:
    """What PPO.run takes, small."""
    defaults = {
        "task": ToyTask(),
        "model": Scratch(num_layers=1, d_model=16, num_heads=2, context_len=16),
        "reward": Keyword(keywords=["w7"]),
        "sampler": CachedSampler(gen_len=4),
        "optimizer": AdamWSettings(base_lr=3e-3, head_lr=3e-3),
        "schedule": Constant(),
    }
    return {**defaults, **replaced}


def start(ppo: PPO, path: Path, **replaced: Any) -> tuple[Actors, TrainState]:
    """Actors and state before the first phase."""
    p = parts(**replaced)
    actors = load_actors(context(path), p["task"], p["model"], p["reward"], p["sampler"])
    state = TrainState.start(
        actors.policy, p["optimizer"], p["schedule"], total_phases=ppo.total_phases, seed=1
    )
    return actors, state
