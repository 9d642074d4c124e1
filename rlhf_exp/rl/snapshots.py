"""When a run keeps a snapshot of its trained weights, and how much space snapshots take."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BeforeValidator

from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.rl.state import TrainState
from rlhf_exp.runs.snapshots import write_snapshot
from rlhf_exp.settings import Count, Index

SnapshotPhases = Literal["log"] | Count | tuple[Index, ...]
SnapshotDtype = Literal["fp32", "bf16"]
DTYPES: dict[SnapshotDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _one_kind(value: Any) -> Any:
    """The value. Raises one ValueError instead of pydantic's errors for each possible type."""
    phases = value if isinstance(value, list | tuple) else [value]
    numbers = all(isinstance(phase, int) and not isinstance(phase, bool) for phase in phases)
    least = 0 if phases is value else 1
    if value in (None, "log") or (numbers and min(phases, default=0) >= least):
        return value
    raise ValueError("give log, a number of phases of at least 1, or a list such as [0,10,100]")


OneKind = BeforeValidator(_one_kind)


def is_due(phases: SnapshotPhases, phase: int, *, is_last: bool) -> bool:
    """Returns True if a phase has a snapshot: "log" is 0, 1, 2, 4, 8 and so on and the last phase;
    a number N is 0, N, 2 N and so on and the last; a list is what it says."""
    if isinstance(phases, tuple):
        return phase in phases
    if is_last:
        return True
    return phase & (phase - 1) == 0 if phases == "log" else phase % phases == 0


def due_phases(phases: SnapshotPhases, total_phases: int) -> list[int]:
    """The phases of a run that have a snapshot."""
    return [
        phase
        for phase in range(total_phases + 1)
        if is_due(phases, phase, is_last=phase == total_phases)
    ]


@dataclass(frozen=True, kw_only=True)
class Snapshots:
    """Writes the snapshots of a run: the trained weights as they are evaluated and saved."""

    folder: Path
    phases: SnapshotPhases
    dtype: SnapshotDtype

    def keep(self, state: TrainState, *, is_last: bool = False) -> None:
        """Writes a snapshot if this phase has one. It is on the disk before a checkpoint says that
        the phase is done, so a run that is resumed lacks none."""
        if is_due(self.phases, state.phase, is_last=is_last):
            weights = state.trained_weights()
            write_snapshot(self.folder, state.phase, weights, DTYPES[self.dtype])


def trained_entries(
    model: PreTrainedModel,
    select: Callable[[PreTrainedModel], None],
    *,
    value_head: bool,
    separate_values: bool,
) -> int:
    """The number of trained weights of a policy on the model, which may be without weights and is
    changed. `select` marks those of the model that are trained."""
    output, inputs = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    d_model = output.shape[1]
    count = 4 * d_model * (d_model + 1) + 4 * d_model + 1 if value_head else 0
    if separate_values:  # see TransformerWithValueHead.separate_values
        count += sum(p.numel() for p in model.parameters())
        count -= output.numel() if output is not inputs else 0
    select(model)
    return count + sum(p.numel() for p in model.parameters() if p.requires_grad)
