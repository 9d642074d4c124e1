"""Whole commands, small: what they leave behind, that they repeat, and how they are stopped."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, pipeline

from rlhf_exp.models.loading import build_policy, load_policy
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.scratch import Scratch, ScratchClassifier
from rlhf_exp.tasks.tokenizers import word_tokenizer
from tests.app.test_run import OFFLINE, TINY, TRAIN, Outcome, train, written
from tests.builders import assert_near
from tests.forked import Command

# The default experiment, every number in it small.
SMALL = (
    "task.num_reviews=600", "task.num_labelled=300", "task.num_held_out=100", "sampler.gen_len=8",
    "prepare.base.schedule.warmup_steps=2", "prepare.classifier.schedule.warmup_steps=2",
    "prepare.base.stage.log_every=5", "stage.total_phases=3", "schedule.warmup_steps=1",
    "stage.batch_size=8", "stage.eval_every=2", "stage.eval_samples=16",
)  # fmt: skip
EVALUATED = {"eval/score", "eval/kl", "eval/kl_sum", "eval/entropy", "eval/distinct_3"}
LOGGED = {
    "objective/scores", "objective/kl", "objective/kl_sum", "objective/entropy",
    "policy/approxkl", "policy/clipfrac", "loss/policy", "loss/value", "val/explained_variance",
    "grad_norm/base", "grad_norm/head", "lr/base", "lr/head", "sample/len_mean",
    "sample/distinct_3", "time/rollout_s", "time/sample_s", "time/measure_s",
    "time/score_s", "time/learn_s", "time/tokens_per_s",
}  # fmt: skip


def environment(folder: Path, **more: str) -> dict[str, str]:
    wandb = {f"WANDB_{n}": str(folder) for n in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return {**kept, **OFFLINE, **wandb, "OMP_NUM_THREADS": "1", **more}


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def status(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["status"]


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a first run, W&B offline, in a process of its own, and what it said."""
    folder = tmp_path_factory.mktemp("reviews")
    variables = environment(folder / "of wandb", WANDB_MODE="offline")
    with Command(folder, *SMALL, environment=variables) as command:
        assert command.wait() == 0, command.said()
    [path] = (folder / "outputs" / "reviews").iterdir()
    return path, command.said()


def again(first: tuple[Path, str], folder: Path, *more: str, flags: Sequence[str] = ()) -> Outcome:
    """The same command in this process, in another folder but on the same artifacts."""
    return train(folder, *flags, *SMALL, f"artifacts_dir={artifacts_of(first)}", *more)


def artifacts_of(first: tuple[Path, str]) -> Path:
    return first[0].parents[1] / "artifacts"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--help"], ["python train.py -m stage.kl_coef=", "experiment: a whole run"]),
        (["--cfg", "job"], ["  total_phases: 100\n", "base_model: artifact:base\n"]),
    ],
)
def test_a_question_is_answered_without_torch(tmp_path, arguments, answer):
    script = (
        "import atexit, runpy, sys\n"
        f"sys.argv = {['train.py', *arguments]}\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "False\n")
    for words in answer:
        assert words in done.stdout
    assert written(tmp_path) == []


def test_a_run_leaves_all_that_it_promises(first):
    folder, _ = first
    assert {path.name for path in folder.iterdir()} >= {
        ".hydra", "train.log", "status.json", "environment.txt", "metrics.jsonl", "samples.jsonl",
        "result.json", "resolved_config.json", "curves.png", "model", "checkpoints",
    }  # fmt: skip
    assert {path.name for path in (folder / ".hydra").iterdir()} == {
        "config.yaml", "hydra.yaml", "overrides.yaml",
    }  # fmt: skip
    assert status(folder) == "done"
    assert (folder / "environment.txt").read_text().startswith("commit ")
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    config = json.loads((folder / "resolved_config.json").read_text())
    assert config["model"]["base_model"] == str(
        artifacts_of(first).relative_to(Path(folder.parents[2]))
        / next(artifacts_of(first).glob("base-*")).name
    )
    assert config["stage"]["total_phases"] == 3
    card = (folder / "model" / "README.md").read_text()
    assert "# reviews" in card
    assert "| `eval/score` |" in card
    [offline] = (folder / "wandb").glob("offline-run-*")
    assert [*offline.glob("*.wandb")]
    assert not (folder.parents[2] / "wandb").exists()

    result = json.loads((folder / "result.json").read_text())
    assert result.keys() == {
        "before", "after", "memory", "seconds", "prepare", "stopped", "reference_sha256",
    }  # fmt: skip
    assert result["prepare"].keys() == {"base", "classifier"}
    assert 0 <= result["prepare"]["classifier"]["heldout/accuracy"] <= 1
    assert result["before"].keys() == result["after"].keys() >= EVALUATED
    assert result["seconds"].keys() == {
        "prepare.base", "prepare.classifier", "load", "compile", "rollout", "learn", "evaluate",
        "save", "total",
    }  # fmt: skip
    # A forked process counts from the start of the one that it is forked from.
    assert all(0 <= value < 86_400 for value in result["seconds"].values())

    samples = json_lines(folder / "samples.jsonl")
    assert [row["phase"] for row in samples] == [0] * 16 + [2] * 16 + [3] * 16
    for row in samples:
        assert row["prompt"] == "this movie was really"
        assert row["completion"].startswith(" ")
        assert 0 <= row["score"] <= 1
    last = [row["score"] for row in samples[-16:]]
    assert result["after"]["eval/score"] == pytest.approx(sum(last) / 16)


def test_metrics_are_one_row_a_phase_and_one_an_evaluation(first):
    rows = json_lines(first[0] / "metrics.jsonl")
    evaluations = [row for row in rows if "eval/score" in row]
    phases = [row for row in rows if "eval/score" not in row]
    assert [row["phase"] for row in evaluations] == [0, 2, 3]
    assert [row["phase"] for row in phases] == [1, 2, 3]
    for row in phases:
        assert row.keys() >= LOGGED
    for row in evaluations:
        assert row.keys() >= EVALUATED
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert evaluations[0]["eval/kl"] == pytest.approx(0, abs=1e-6)
    assert evaluations[-1]["eval/kl"] > 1e-4
    # Half of its rate in the phase of warm-up, its whole one after it, then half way to a tenth.
    assert [row["lr/base"] / phases[1]["lr/base"] for row in phases] == pytest.approx([1, 1, 0.55])


def test_what_is_said_is_a_plain_line_a_phase_and_a_table(first):
    _, said = first
    lines = said.splitlines()
    for phase in (1, 2, 3):
        assert len([line for line in lines if line.startswith(f"phase {phase}/3  score ")]) == 1
    assert "\r" not in said
    assert "\x1b" not in said
    assert "Warning" not in said
    for step in ("base", "classifier"):
        assert f"{step}: building" in lines
    assert "held-out accuracy" in said
    assert "before and after" in said
    assert re.search(r"this movie was really \w+", said)
    for word in ("before: score", "after:  score", "curves: outputs", "run folder: outputs"):
        assert any(line.startswith(word) for line in lines), word
    log = (first[0] / "train.log").read_text()
    assert "phase 3/3  score" in log
    assert "INFO] run folder: " in log


def test_the_model_of_a_run_opens_again(first):
    folder, _ = first
    policy = load_policy(folder)
    tokens = policy.tokenizer("this movie was really", return_tensors="pt")["input_ids"]
    other = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert_near(policy(tokens)[0], other(tokens).logits, tolerance=1e-6)
    base = load_policy(next(artifacts_of(first).glob("base-*")))
    assert not torch.equal(policy(tokens)[0], base(tokens)[0])
    assert (folder / "model" / "value_head.safetensors").is_file()


def test_the_model_of_a_run_opens_in_a_pipeline_and_in_transformer_lens(first):
    model = str(first[0] / "model")
    generate = pipeline("text-generation", model=model)
    [answer] = generate(
        "this movie was really", max_new_tokens=5, do_sample=False, return_tensors=True
    )
    policy = load_policy(first[0])
    ids = policy.tokenizer("this movie was really")["input_ids"]
    for _ in range(5):
        ids.append(int(policy(torch.tensor([ids]))[0][0, -1].argmax()))
    assert answer["generated_token_ids"] == ids
    bridge = TransformerBridge.boot_transformers(model)
    tokens = torch.tensor([ids])
    torch.testing.assert_close(bridge(tokens), policy(tokens)[0], rtol=0, atol=1e-4)


def test_a_second_run_reuses_the_artifacts_and_repeats_the_first(first, tmp_path):
    outcome = again(first, tmp_path, "logger=local")
    assert (outcome.code, outcome.raised) == (0, None)
    for step in ("base", "classifier"):
        assert re.search(rf"^{step}: reusing ", outcome.out, re.MULTILINE)
    assert "building" not in outcome.out
    [folder] = tmp_path.glob("outputs/reviews/*")

    def untimed(path: Path) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if not k.startswith("time/")} for row in json_lines(path)
        ]

    assert untimed(folder / "metrics.jsonl") == untimed(first[0] / "metrics.jsonl")
    assert json_lines(folder / "samples.jsonl") == json_lines(first[0] / "samples.jsonl")
    assert not (folder / "wandb").exists()


def test_the_jobs_of_a_sweep_share_their_artifacts(first, tmp_path):
    words = ["stage.kl_coef=0.1,1", "stage.total_phases=2"]
    refused = again(first, tmp_path, *words, "sampler.gen_len=500,8", flags=["-m"])
    assert refused.code == 2
    assert "2 of 4 jobs cannot run" in refused.err
    assert "sampler.gen_len=500 leaves no room for a prompt" in refused.err
    assert written(tmp_path) == []

    outcome = again(first, tmp_path, *words, flags=["-m"])
    assert (outcome.code, outcome.raised) == (0, None)
    [sweep] = tmp_path.glob("outputs/reviews/sweeps/*")
    jobs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [path.name for path in jobs] == ["0_kl_coef=0.1", "1_kl_coef=1"]
    for path, kl_coef in zip(jobs, (0.1, 1.0), strict=True):
        assert status(path) == "done"
        log = (path / "train.log").read_text()
        assert "base: reusing" in log
        assert "before and after" in log
        assert (
            json.loads((path / "resolved_config.json").read_text())["stage"]["kl_coef"] == kl_coef
        )
        result = json.loads((path / "result.json").read_text())
        parts = sum(s for name, s in result["seconds"].items() if name != "total")
        assert result["seconds"]["total"] == pytest.approx(parts)
        assert len(json_lines(path / "metrics.jsonl")) == 4


def test_control_c_while_it_learns_ends_a_run_in_a_line(first, tmp_path):
    more = [f"artifacts_dir={artifacts_of(first)}", "stage.total_phases=300"]
    variables = environment(tmp_path / "of wandb", WANDB_MODE="offline")
    with Command(tmp_path, *SMALL, *more, environment=variables) as command:
        command.await_that(lambda: "\nphase " in command.said())
        os.kill(command.pid, signal.SIGINT)
        assert command.wait() == 130, command.said()
    assert "Traceback" not in command.said()
    last = command.said().splitlines()[-1]
    assert last.startswith("stopped by SIGINT; go on with: python train.py resume=outputs/rev")
    [folder] = tmp_path.glob("outputs/reviews/*")
    assert status(folder) == "interrupted"
    assert len(json_lines(folder / "metrics.jsonl")) >= 2


def test_the_hooked_engine_and_the_bridge_run_the_same_experiment(first, tmp_path):
    outcome = again(
        first, tmp_path, "model.engine=hooked", "sampler=bridge", "stage.total_phases=2",
        "stage.batches_per_learning_phase=1",
    )  # fmt: skip
    assert (outcome.code, outcome.raised) == (0, None)
    [folder] = tmp_path.glob("outputs/reviews/*")
    assert status(folder) == "done"
    before, hooked = (json.loads((f / "result.json").read_text())["before"]
                      for f in (first[0], folder))  # fmt: skip
    # The same policy: the entropy over its vocabulary of 500 words is that of other samples.
    assert hooked["eval/entropy"] == pytest.approx(before["eval/entropy"], rel=0.05)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """A policy and a classifier of the classes that gpt2-medium and distilbert-imdb have."""
    folder = tmp_path_factory.mktemp("local")
    words = ["This", "is", "movie", "was", "really", "good", "bad", ".", "a"]
    model = Scratch(num_layers=1, d_model=16, num_heads=2, context_len=64)
    tokenizer = word_tokenizer(words)
    policy = build_policy(model, lambda: tokenizer, device=torch.device("cpu"), seed=0)
    save_policy(policy, folder / "policy")
    classifier = ScratchClassifier(d_model=16, num_heads=2, context_len=64)
    labels = ("NEGATIVE", "POSITIVE")
    classifier.classifier(tokenizer, labels, seed=0).save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    return {name: folder / name for name in ("policy", "classifier")}


@pytest.mark.parametrize("name", ["periods", "imdb_sentiment"])
def test_experiments_of_the_hub_run_on_local_directories(directories, tmp_path, name):
    given = [f"experiment={name}", "model=local", f"model.base_model={directories['policy']}"]
    if name == "imdb_sentiment":
        given.append(f"reward.name={directories['classifier']}")
    small = [word for word in TINY if word.startswith(("stage.", "schedule.", "sampler."))]
    outcome = train(tmp_path, *given, *small)
    assert (outcome.code, outcome.raised) == (0, None)
    [folder] = tmp_path.glob(f"outputs/{name}/*")
    assert status(folder) == "done"
    rows = json_lines(folder / "samples.jsonl")
    prompt = {"periods": "This is", "imdb_sentiment": "This movie was really"}[name]
    assert {row["prompt"] for row in rows} == {prompt}
    if name == "periods":
        assert all(row["score"] == (prompt + row["completion"]).count(".") for row in rows)
    else:
        # The notebook's top_k, which evaluations do without.
        assert "truncated distribution" in outcome.out
        phases = [r for r in json_lines(folder / "metrics.jsonl") if "eval/score" not in r]
        assert all(0 < row["sample/kept_mass"] <= 1 for row in phases)
