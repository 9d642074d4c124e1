"""experiment=arithmetic through train.py at toy size: four steps, each reused, each runnable alone,
and what is said of bad pairs and of models that do not fit each other."""

import json
import math
from pathlib import Path

import pytest

from rlhf_exp.models.loading import load_policy
from rlhf_exp.tasks.pairs import read_pairs
from tests.app.test_run import assert_refused, run_folder, train

SMALL = (
    "logger=local", "seed=3", "task.num_series=400",
    "prepare.pretrained.model.d_model=32", "prepare.pretrained.stage.max_updates=20",
    "prepare.sft.stage.max_updates=20", "prepare.sft.stage.stop_at=null",
    "prepare.pretrained.schedule.warmup_steps=5", "prepare.sft.schedule.warmup_steps=5",
    "prepare.sft.stage.eval_every=10", "prepare.sft.stage.eval_samples=16",
)  # fmt: skip
LEARNED = (
    "prepare.preferences.stage.num_pairs=120", "prepare.preferences.stage.num_held_out=60",
    "prepare.reward_model.stage.epochs=8", "prepare.reward_model.stage.width=32",
    "prepare.reward_model.stage.batch_size=30",
    "stage.total_phases=2", "schedule.warmup_steps=1", "stage.batch_size=16",
    "stage.eval_samples=16", "stage.eval_every=1",
)  # fmt: skip
EVALUATED = {
    "eval/exact_match", "eval/greedy_exact_match", "eval/true_reward", "eval/score", "eval/kl",
    "eval/reward_gap",
}  # fmt: skip
ALONE = ("~experiment", "logger=local", "model=local")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the whole chain was run in."""
    folder = tmp_path_factory.mktemp("chain")
    outcome = train(folder, "experiment=arithmetic", *SMALL, *LEARNED)
    assert (outcome.code, outcome.raised) == (0, None), outcome.err
    return folder


def artifact(chain: Path, name: str) -> Path:
    [folder] = chain.glob(f"outputs/artifacts/{name}-*")
    return folder


def only_run(folder: Path, name: str) -> Path:
    [found] = (folder / "outputs" / name).iterdir()
    return found


def test_the_chain_leaves_results_figures_and_a_policy(chain: Path) -> None:
    run = only_run(chain, "arithmetic")
    result = json.loads((run / "result.json").read_text())
    assert result["after"].keys() >= EVALUATED
    assert list(result["prepare"]) == ["pretrained", "sft", "preferences", "reward_model"]
    scored = result["prepare"]["reward_model"]
    assert {"heldout/pair_accuracy", "heldout/spearman", "heldout/mse"} <= scored.keys()
    assert scored["heldout/pair_accuracy"] > 0.5
    assert {path.name for path in run.glob("*.png")} == {
        "curves.png", "pretrained_loss.png", "sft_loss.png", "reward_model_loss.png",
        "reward_model_held_out.png",
    }  # fmt: skip
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {"score", "true_reward", "exact"} <= samples[-1].keys()
    assert load_policy(run).context_len == 64


def test_every_number_of_the_chain_is_finite(chain: Path) -> None:
    files = [*chain.glob("outputs/*/*/metrics.jsonl")]
    assert len(files) == 5
    for file in files:
        for line in file.read_text().splitlines():
            assert all(map(math.isfinite, json.loads(line).values())), file


def test_held_out_pairs_have_prompts_of_their_own(chain: Path) -> None:
    files = [artifact(chain, "preferences") / "pairs" / f"{n}.jsonl" for n in ("train", "test")]
    train_prompts, held_out = ({pair.prompt for _, pair in read_pairs(file)} for file in files)
    assert len(train_prompts) > 100
    assert not train_prompts & held_out


def test_the_true_reward_stands_on_the_same_model_and_has_no_gap(chain: Path) -> None:
    outcome = train(chain, "experiment=arithmetic_true_reward", *SMALL, *LEARNED[-5:])
    assert outcome.code == 0, outcome.err
    assert "sft: reusing" in outcome.out + outcome.err
    result = json.loads((only_run(chain, "arithmetic_true_reward") / "result.json").read_text())
    assert list(result["prepare"]) == ["pretrained", "sft"]
    assert result["after"]["eval/reward_gap"] == 0
    assert result["after"]["eval/score"] == result["after"]["eval/true_reward"]


def test_dpo_learns_from_the_same_pairs_without_a_reward_model(chain: Path) -> None:
    small = [word for word in SMALL if not word.startswith("task.")]
    steps = [word for word in LEARNED if word.startswith("prepare.preferences")]
    outcome = train(
        chain, "experiment=arithmetic_dpo", *small, *steps, "schedule.warmup_steps=1",
        "prepare.pretrained.task.num_series=400", "prepare.sft.task.num_series=400",
        "prepare.preferences.task.num_series=400", "stage.eval_samples=16", "stage.epochs=1",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "preferences: reusing" in outcome.out + outcome.err
    result = json.loads((only_run(chain, "arithmetic_dpo") / "result.json").read_text())
    assert list(result["prepare"]) == ["pretrained", "sft", "preferences"]
    assert result["after"].keys() == result["before"].keys() >= EVALUATED
    assert result["after"]["heldout/loss"] != result["before"]["heldout/loss"]
    assert result["before"]["heldout/rewards/accuracies"] == 0.5


def test_until_builds_up_to_a_step_and_stops(chain: Path) -> None:
    outcome = train(chain, "experiment=arithmetic", "name=half", "until=sft", *SMALL, *LEARNED)
    assert outcome.code == 0, outcome.err
    run = only_run(chain, "half")
    result = json.loads((run / "result.json").read_text())
    assert list(result["prepare"]) == ["pretrained", "sft"]
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    assert {path.name for path in run.glob("*.png")} == {"pretrained_loss.png", "sft_loss.png"}
    assert not (run / "model").exists()


def test_until_a_first_step_that_is_not_made_yet(tmp_path: Path) -> None:
    outcome = train(tmp_path, "experiment=arithmetic", "until=pretrained", *SMALL)
    assert (outcome.code, outcome.raised) == (0, None), outcome.err
    result = json.loads((only_run(tmp_path, "arithmetic") / "result.json").read_text())
    assert list(result["prepare"]) == ["pretrained"]


def test_until_a_step_that_there_is_not(tmp_path: Path) -> None:
    outcome = train(tmp_path, "experiment=arithmetic", "until=stf")
    assert_refused(
        outcome, "until=stf: no step of prepare has that name; there are: pretrained, sft"
    )
    assert [path.name for path in run_folder(tmp_path).iterdir()] == ["train.log"]


def test_each_step_runs_alone_on_what_the_others_left(chain: Path, tmp_path: Path) -> None:
    model = f"model.base_model={artifact(chain, 'sft')}"
    sampling = ("sampler.gen_len=16", "sampler.stop_at_eos=true")
    outcome = train(
        tmp_path, *ALONE, "name=pairs", "stage=preferences", "task=arithmetic", "reward=arithmetic",
        model, *sampling, "stage.num_pairs=60", "stage.num_held_out=20", "stage.format=parquet",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    pairs = only_run(tmp_path, "pairs")
    assert (pairs / "pairs" / "train.parquet").is_file()
    outcome = train(
        tmp_path, *ALONE, "name=scorer", "stage=reward_model", "task=pairs", f"task.path={pairs}",
        model, "stage.epochs=2", "stage.batch_size=10", "stage.head=last_token",
        "stage.read_layers=1", "schedule=constant",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    outcome = train(
        tmp_path, "experiment=yours", *ALONE[1:], "name=ppo", "task=arithmetic", model, *sampling,
        "reward=reward_model",
        f"reward.path={only_run(tmp_path, 'scorer')}", *LEARNED[-5:],
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = json.loads((only_run(tmp_path, "ppo") / "result.json").read_text())
    assert result["after"].keys() >= EVALUATED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("task=reviews", "reward=arithmetic"),
            "'this movie was really' is not a prompt of task=arit",
        ),
        (("task=arithmetic", "reward=arithmetic"), "set sampler.stop_at_eos=true"),
    ],
)
def test_a_task_and_a_reward_or_sampler_that_do_not_fit(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert_refused(train(tmp_path, "~experiment", "logger=local", *arguments), message)


ROW = {"prompt": "a b", "chosen": " c", "rejected": " d"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "FILE.jsonl holds no rows"),
        ([{"prompt": "a", "chosen": "b"}], "FILE.jsonl, row 1 has no field rejected"),
        ([ROW, ROW | {"rejected": " c"}], "FILE.jsonl, row 2, field rejected equals chosen"),
        (
            [ROW, ROW | {"chosen_reward": 1.0}],
            "FILE.jsonl, row 2 has one reward but no rejected_reward: give both",
        ),
    ],
)
def test_bad_pairs_are_refused_by_file_row_and_field(
    tmp_path: Path, rows: list[dict[str, str]], message: str
) -> None:
    (tmp_path / "FILE.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = train(
        tmp_path, *ALONE, "stage=reward_model", "task=pairs", "task.path=FILE.jsonl",
        "model.base_model=DIR",
    )  # fmt: skip
    assert_refused(outcome, message)


def test_a_word_that_the_model_does_not_know_is_named_with_its_row(
    chain: Path, tmp_path: Path
) -> None:
    source = artifact(chain, "preferences") / "pairs" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[6]["rejected"] = " 12 13 thirteen"
    (tmp_path / "FILE.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = train(
        tmp_path, *ALONE, "stage=reward_model", "task=pairs", "task.path=FILE.jsonl",
        "schedule.warmup_steps=1", f"model.base_model={artifact(chain, 'sft')}",
    )  # fmt: skip
    assert_refused(outcome, "FILE.jsonl, row 7, field rejected holds 'thirteen'")


def test_a_reward_model_with_another_tokenizer_is_refused(chain: Path, tmp_path: Path) -> None:
    outcome = train(
        tmp_path, "~experiment", "logger=local", "task=reviews", "reward=reward_model",
        f"reward.path={artifact(chain, 'reward_model')}", "model.d_model=16",
    )  # fmt: skip
    assert_refused(outcome, "its tokenizer differs from the policy's: token")
    outcome = train(
        tmp_path, "~experiment", "logger=local", "task=reviews", "reward=reward_model",
        f"reward.path={artifact(chain, 'sft')}", "model.d_model=16",
    )  # fmt: skip
    assert_refused(outcome, "holds no reward model")
