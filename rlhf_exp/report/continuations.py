"""Completions of a finished run's policy, beside those of its base model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf_exp.models.loading import Pretrained, build_policy
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.context import pick_device
from rlhf_exp.runs.paths import read_resolved_config
from rlhf_exp.security.printable import printable
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.tasks.protocol import Prompt, PromptRow
from rlhf_exp.training.seeding import make_generator

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunOnDisk:
    """A finished run: its folder, the settings of its base model (None: trained from scratch), and
    whether its prompts begin with BOS."""

    folder: Path
    base: Pretrained | None
    prepend_bos: bool | None

    @property
    def tuned(self) -> Pretrained:
        """The tuned model; code that came with the base is trusted if the base's is."""
        trusted = self.base is not None and self.base.trust_remote_code
        return Pretrained(base_model=str(self.folder), trust_remote_code=trusted)


def read_run(folder: str | Path, *, trust_remote_code: bool = False) -> RunOnDisk:
    """The run in a folder. Its model's code is trusted only if both the run and the caller trust
    it: the folder may come from someone else. Raises ConfigError if it holds no finished run."""
    path = Path(folder).expanduser()
    try:
        config: dict[str, Any] = read_resolved_config(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} is not the folder of a finished run: resolved_config.json is missing or"
            " broken"
        ) from error
    if len(config.get("intervention") or {}) > 1:  # more than its class
        log.warning("%s was trained under an intervention; its saved model does not have it", path)
    return RunOnDisk(
        folder=path,
        base=_pretrained(config.get("model") or {}, trust_remote_code),
        prepend_bos=(config.get("task") or {}).get("prepend_bos"),
    )


def _pretrained(model: Mapping[str, Any], trust_remote_code: bool) -> Pretrained | None:
    """The settings of the run's pretrained model, its revision included, which download nothing of
    their own accord; None without one."""
    if "base_model" not in model:
        return None
    dropped = ("_target_", "trust_remote_code", "fetch")
    fields = {k: v for k, v in model.items() if k not in dropped}
    trusted = trust_remote_code and bool(model.get("trust_remote_code"))
    return Pretrained(**fields, trust_remote_code=trusted)


def read_prepend_bos(run: str | Path) -> bool | None:
    """`task.prepend_bos` of a finished run. None if `run` is not a run folder."""
    try:
        return read_run(run).prepend_bos
    except ConfigError:
        return None


def continuations(
    model: Pretrained,
    prompts: Sequence[str],
    *,
    prepend_bos: bool | None,
    chat: bool,
    sampler: CachedSampler,
    seed: int,
) -> tuple[str, ...]:
    """The model's completion of each prompt, or with `chat` its answer to it as a user's message.
    The same seed gives every model the same random numbers."""
    policy = build_policy(model, None, device=pick_device("auto"), seed=0)
    rows: list[Prompt] = [
        PromptRow([{"role": "user", "content": prompt}], {}) if chat else prompt
        for prompt in prompts
    ]
    batch = encode_prompts(policy.tokenizer, rows, prepend_bos=prepend_bos, device=policy.device)
    room = policy.context_len - batch.tokens.shape[1]
    if sampler.gen_len > room:
        raise ConfigError(f"the context leaves room for {max(0, room)} tokens: lower --gen-len")
    generator = make_generator(seed, "continuations", policy.device)
    return sampler(policy, batch, generator).completions.texts


def side_by_side(prompts: Sequence[str], base: Sequence[str] | None, tuned: Sequence[str]) -> Table:
    """A table of the completions, one row per prompt; no `base` column if `base` is None."""
    table = Table(show_lines=True, expand=True)
    columns = {"tuned": tuned} if base is None else {"base": base, "tuned": tuned}
    table.add_column("prompt", ratio=1)
    for name in columns:
        table.add_column(name, ratio=2)
    for row in zip(prompts, *columns.values(), strict=True):
        # Text, not markup: a completion may hold anything.
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
