"""Whole runs of a tiny model, in this process, in folders as train.py leaves them."""

from pathlib import Path

from rlhf_exp.app import run
from rlhf_exp.app.experiment import run_experiment
from tests.builders import without_checks
from tests.composed import compose
from tests.rl.toy import saved_model

WORDS = (
    "~experiment", "logger=local", "sampler.gen_len=6", "stage.total_phases=3",
    "stage.batch_size=8", "stage.eval_samples=8", "stage.num_minibatches=1",
    "stage.compute.dtype=fp32", "stage.checkpoint_every=null", "stage.snapshots=log",
    "optimizer.base_lr=1e-2", "schedule.warmup_steps=1",
)  # fmt: skip
SAVED = (
    "model=local", "task=prefix", "task.prefix=[w0 w1,w2,w3 w4 w5]", "task.held_out_fraction=0",
    "task.prepend_bos=true", "reward=keyword", "reward.keywords=[w7]",
)  # fmt: skip


def tiny_run(path: Path, *words: str, architecture: str = "llama", saved: bool = True) -> Path:
    """The folder of a finished run, of a saved model with two layers unless the words name another
    one."""
    if saved:
        base = path.with_name(f"{path.name}_base")
        saved_model(base, architecture=architecture, context_len=16)
        words = (*SAVED, f"model.base_model={base}", *words)
    config = run.to_container(compose(*WORDS, *words))
    job, instantiate = run._read(config, path, [], sweep=False, resume=False)
    with without_checks():
        run_experiment(config, job, instantiate)
    return path
