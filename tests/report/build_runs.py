"""Run folders as training leaves them, with made-up numbers.

python -m tests.report.build_runs FOLDER --runs 200 --phases 200
"""

import argparse
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KL_COEFS = (0.03, 0.1, 0.3, 1.0)
KL_VARIANCES = {"k1": 2.0, "k2": 3.0, "k3": 1.5}  # of a KL of 1
WORDS = (
    "the",
    "film",
    "was",
    "a",
    "bold",
    "warm",
    "dull",
    "slow",
    "plot",
    "great",
    "poor",
    "music",
)


def config(*, kl_coef: float = 0.3, clip_coef: float = 0.2, lr: float = 3e-4, seed: int = 1):
    """A resolved configuration, shortened."""
    return {
        "name": "reviews",
        "seed": seed,
        "prepare_seed": 0,
        "artifacts_dir": "outputs/artifacts",
        "stage": {
            "_target_": "rlhf_exp.stages.ppo.PPO",
            "batch_size": 64,
            "kl_coef": kl_coef,
            "clip_coef": clip_coef,
            "value_clip_coef": None,
        },
        "optimizer": {"base_lr": lr, "head_lr": 1e-3},
        "task": {"_target_": "rlhf_exp.tasks.reviews.Reviews", "prefix": "this movie was really"},
        "logger": {"_target_": "rlhf_exp.tracking.protocol.LocalLogger"},
    }


def rows(settings: Mapping[str, Any], *, phases: int = 20, eval_every: int = 10):
    """The rows of metrics.jsonl: a score that rises towards a plateau which a smaller penalty makes
    higher, and a KL that it makes larger."""
    stage, seed = settings["stage"], settings["seed"]
    noise = random.Random(f"{seed} {stage} {settings['optimizer']}")
    plateau = 0.98 - 0.1 * stage["kl_coef"] + noise.gauss(0, 0.005)
    drift = 0.1 / (0.3 + stage["kl_coef"]) + noise.gauss(0, 0.005)
    written = [evaluation(0, 0.52, 0.0, noise)]
    for phase in range(1, phases + 1):
        done = 1 - math.exp(-5 * phase / phases)
        score = 0.52 + (plateau - 0.52) * done
        written.append(rollout(phase, score + noise.gauss(0, 0.01), drift * done**2, noise))
        if phase % eval_every == 0 or phase == phases:
            written.append(evaluation(phase, score, drift * done**2, noise))
    return written


def evaluation(phase: int, score: float, kl: float, noise: random.Random) -> dict[str, Any]:
    """A row of an evaluation."""
    names = {"score": score, "kl": kl, "kl_sum": 20 * kl, "entropy": 1.3 + noise.gauss(0, 0.02)}
    names |= {"distinct_3": 0.4 + noise.gauss(0, 0.005), "len_mean": 20.0}
    return {"phase": phase, **{f"eval/{name}": value for name, value in names.items()}}


def rollout(phase: int, score: float, kl: float, noise: random.Random) -> dict[str, Any]:
    """A row of a rollout, with every metric that PPO writes."""
    row = {
        "objective/scores": score,
        "objective/scores_std": 0.1,
        "objective/kl": kl,
        "objective/kl_sum": 20 * kl,
        **{f"objective/kl_{name}": kl for name in ("k1", "k2", "k3")},
        **{f"objective/kl_{name}_var": kl * var for name, var in KL_VARIANCES.items()},
        "objective/entropy": 1.3,
        "val/explained_variance": 0.5,
        "sample/len_mean": 20.0,
        "sample/distinct_3": 0.4,
        "loss/total": 0.02,
        "loss/policy": -0.01,
        "loss/value": 0.3,
        "loss/kl": kl,
        "loss/entropy": 1.3,
        "policy/approxkl": 0.004,
        "policy/clipfrac": 0.05,
        "grad_norm/base": 2.0,
        "grad_norm/head": 0.5,
        "lr/base": 3e-4,
        "lr/head": 1e-3,
        "time/rollout_s": 0.0312876,
        "time/sample_s": 0.0184764,
        "time/learn_s": 0.1119824,
        "time/tokens_per_s": 431.3678,
    }
    return {"phase": phase, **{k: v * (1 + noise.gauss(0, 1e-3)) for k, v in row.items()}}


def best_of_n_config(*, seed: int = 1):
    """A resolved configuration of stage=best_of_n, shortened."""
    stage = {"_target_": "rlhf_exp.stages.best_of_n.BestOfN", "samples_per_prompt": 8}
    others = {name: value for name, value in config(seed=seed).items() if name != "optimizer"}
    return {**others, "stage": stage}


def best_of_n_rows() -> list[dict[str, Any]]:
    """The rows of the best of 1, 2, 4 and 8 samples."""
    rising = [(1, 0.52, 0.0), (2, 0.7, 0.01), (4, 0.85, 0.03), (8, 0.93, 0.06)]
    return [
        {"phase": n, "eval/score": score, "eval/kl": kl, "eval/kl_sum": 20 * kl}
        for n, score, kl in rising
    ]


def limit_points(start: float = 0.52, *, most: float = 2.0, points: int = 20):
    """Points of a limit that rises with the root of the KL, from the score of the model before
    training to .98."""
    shares = [place / (points - 1) for place in range(points)]
    return [(start + (0.98 - start) * s, most * s**2, 1000 * (1 - 0.98 * s)) for s in shares]


def write_limit(folder: Path, points, true_points=()) -> Path:
    """Writes limit.json into the folder of a run."""
    content = {"scores": [[0.5, 0.6]], "frontier": points, "true_frontier": true_points}
    write_json(folder / "limit.json", content)
    return folder


def efficient(metrics: Sequence[Mapping[str, Any]], share: float = 0.4) -> list[dict[str, Any]]:
    """The rows with an efficiency in each evaluation after the first."""
    return [
        {**row, "eval/kl_efficiency": share} if row.get("eval/kl_sum") else dict(row)
        for row in metrics
    ]


def dpo_config(*, seed: int = 1):
    """A resolved configuration of stage=dpo, shortened."""
    stage = {"_target_": "rlhf_exp.stages.dpo.DPO", "batch_size": 32, "beta": 0.1}
    return {**config(seed=seed), "stage": stage}


def dpo_rows(*, seed: int = 1, updates: int = 10) -> list[dict[str, Any]]:
    """The rows of stage=dpo: pairs are learned, and only evaluations sample."""
    noise = random.Random(seed)
    train = [
        {"phase": n, "train/loss": 0.7 / n, "rewards/margins": n / 10, "lr/base": 1e-4}
        for n in range(1, updates + 1)
    ]
    last = evaluation(updates, 0.8 + noise.gauss(0, 0.02), 0.12 + noise.gauss(0, 0.01), noise)
    return [evaluation(0, 0.52, 0.0, noise), *train, last | {"heldout/loss": 0.6}]


def with_true_reward(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a true reward in each evaluation, lower than the score by the KL."""
    return [
        {**row, "eval/true_reward": row["eval/score"] - row["eval/kl"]}
        if "eval/kl" in row
        else dict(row)
        for row in metrics
    ]


def write_stages(folder: Path, *, seeds: Sequence[int] = (1, 2, 3, 4, 5)) -> Path:
    """Writes runs of PPO with two penalties, DPO, best of n, and SFT, which begin from one model
    and know the true reward."""
    for seed in seeds:
        runs = [(f"ppo{k}", settings, rows(settings, phases=20, eval_every=5))
                for k in (0.1, 1.0) for settings in [config(kl_coef=k, seed=seed)]]  # fmt: skip
        runs += [("dpo", dpo_config(seed=seed), dpo_rows(seed=seed)),
                 ("best", best_of_n_config(seed=seed), best_of_n_rows())]  # fmt: skip
        for name, settings, metrics in runs:
            write_run(folder / f"{name}_{seed}", settings, with_true_reward(metrics))
    sft = {**config(), "stage": {"_target_": "rlhf_exp.stages.sft.SFT", "batch_size": 64}}
    write_run(folder / "sft", sft, supervised_rows())
    return folder


def supervised_rows(*, updates: int = 10) -> list[dict[str, Any]]:
    """The rows of a supervised stage."""
    train = [{"phase": n, "train/loss": 2 / n, "lr/base": 1e-3} for n in range(1, updates + 1)]
    return [*train, {"phase": updates, "heldout/loss": 0.3, "heldout/accuracy": 0.9}]


def samples(phases: Sequence[int], *, count: int = 64) -> list[dict[str, Any]]:
    """The rows of samples.jsonl."""
    return [
        {
            "phase": phase,
            "prompt": f"this movie number {index} was",
            "completion": f" after {phase} {' '.join(random.Random(index).choices(WORDS, k=20))}",
            "score": 0.5 + 0.4 * (phase > 0),
            "kl_sum": 0.1,
        }
        for phase in phases
        for index in range(count)
    ]


def write_run(
    folder: Path,
    settings: Mapping[str, Any] | None,
    metrics: Sequence[Mapping[str, Any]],
    *,
    status: str = "done",
    error: str | None = None,
    shown: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes one run folder; result.json if the status is done."""
    folder.mkdir(parents=True)
    write_json(folder / "status.json", {"status": status, "error": error})
    if settings is not None:
        write_json(folder / "resolved_config.json", settings)
    write_lines(folder / "metrics.jsonl", metrics)
    if shown:
        write_lines(folder / "samples.jsonl", shown)
    evaluations = [{k: v for k, v in r.items() if k != "phase"} for r in metrics if "eval/kl" in r]
    if status == "done" and evaluations:
        result = {"before": evaluations[0], "after": evaluations[-1], "seconds": {"total": 33.1}}
        write_json(folder / "result.json", result)
    return folder


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, content: Sequence[Mapping[str, Any]]) -> None:
    """Writes a JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def write_sweep(
    folder: Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    phases: int = 20,
    eval_every: int = 10,
    limit: int | None = None,
) -> Path:
    """Writes a sweep folder with a run a combination of the grid's values (keys of `config`)."""
    folder.mkdir(parents=True)
    (folder / "multirun.yaml").write_text("hydra: {}\n", encoding="utf-8")
    combinations = itertools.islice(itertools.product(*grid.values()), limit)
    for number, values in enumerate(combinations):
        chosen = dict(zip(grid, values, strict=True))
        settings = config(**chosen)
        name = ",".join(f"{key}={value}" for key, value in chosen.items())
        write_run(
            folder / f"{number}_{name}",
            settings,
            rows(settings, phases=phases, eval_every=eval_every),
            shown=samples(range(0, phases + 1, eval_every)),
        )
    return folder


def main() -> None:
    """Writes a sweep of any size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--phases", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    grid = {"kl_coef": KL_COEFS, "seed": range(1, arguments.seeds + 1)}
    if arguments.runs > len(KL_COEFS) * arguments.seeds:
        clip_coefs = (0.1, 0.2, 0.3, 0.4)
        lrs = [1e-5 * 2**n for n in range(arguments.runs)]
        grid = {"lr": lrs, "clip_coef": clip_coefs, **grid}
    write_sweep(arguments.folder, grid, phases=arguments.phases, limit=arguments.runs)


if __name__ == "__main__":
    main()
