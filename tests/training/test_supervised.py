import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf_exp.runs.context import Context, TrainingError
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.batches import BatchStream, shuffle_batches
from rlhf_exp.training.early_stopping import EXACT, LOSS, EarlyStopping
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import Constant, WarmupDecay
from rlhf_exp.training.supervised import Supervised, SupervisedState, add_gradients
from rlhf_exp.types import LossOutput

from ..states import through_a_file


def train(
    path: Path,
    *,
    num_updates: int = 5,
    log_every: int = 2,
    max_grad_norm: float = 1e9,
    seed: int = 1,
    dropout: float = 0.0,
    broken_at: int | tuple[int, ...] | None = None,
    spoiled_at: int | None = None,
    stop: Callable[[int], bool] | None = None,
    resume: bool = False,
    measure: Callable[[int], None] | None = None,
    metrics: Mapping[str, Tensor] | None = None,
    **options: object,
) -> tuple[nn.Module, list[int]]:
    """A linear model fitted to y = sum(x); returns it and the updates whose loss was asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 1))
    asked: list[int] = []
    data = torch.rand(20, 3, generator=torch.Generator().manual_seed(3))
    batches = BatchStream(shuffle_batches, range(20), 8, torch.Generator().manual_seed(4))

    def losses():
        for index in batches:
            asked.append(len(asked) + 1)
            x = data[index]
            loss = (model(x)[:, 0] - x.sum(dim=1)).square().mean()
            loss = loss * math.nan if asked[-1] in broken else loss
            yield loss if metrics is None else LossOutput(loss=loss, metrics=metrics)

    def spoil(gradient):
        return gradient * math.inf if asked[-1] == spoiled_at else None

    broken = broken_at if isinstance(broken_at, tuple) else (broken_at,)
    model[1].weight.register_hook(spoil)

    adamw = AdamWSettings(base_lr=0.1).build(model)
    context = Context(folder=RunFolder(path), seed=seed, device=torch.device("cpu"), resume=resume)
    schedule = WarmupDecay(warmup_steps=2, final_scale=0.0)
    state = SupervisedState(
        network=model,
        optimizer=adamw,
        scheduler=schedule.build(adamw, total_steps=num_updates),
        batches=batches,
        early_stopping=None if stop is None else asking(stop, path, model),
    )
    given = {"checkpoint_every": None, **options}
    Supervised(max_grad_norm=max_grad_norm, log_every=log_every, **given).fit(
        context, state, losses(), num_updates=num_updates, measure=measure
    )
    return model, asked


def asking(stop: Callable[[int], bool], path: Path, model: nn.Module) -> EarlyStopping:
    """Ends after the update at which `stop` says so; its measurements lie beside the run's."""
    context = Context(
        folder=RunFolder(path.with_name(f"{path.name} measured")), seed=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    return EarlyStopping(
        context, model, lambda update: {EXACT: float(stop(update)), LOSS: 1.0},
        eval_every=1, stop_at=0.5,
    )  # fmt: skip


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_so_many_updates_are_made_and_some_logged(tmp_path):
    _, asked = train(tmp_path)
    assert asked == [1, 2, 3, 4, 5]
    logged = rows(tmp_path)
    assert [row["phase"] for row in logged] == [2, 4, 5]
    names = {"phase", "train/loss", "train/skipped_steps", "grad_norm/base", "lr/base"}
    assert set(logged[0]) == names
    # Multipliers of updates 1 to 5: 1/2, 1, 1, 2/3, 1/3.
    assert [row["lr/base"] for row in logged] == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_metrics_of_a_loss_are_logged_beside_it(tmp_path):
    train(tmp_path / "a", metrics={"loss/part": torch.tensor(0.25)})
    train(tmp_path / "b")
    with_metrics, without = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert [row.pop("loss/part") for row in with_metrics] == [0.25] * 3
    assert with_metrics == without


def test_measurements_are_made_before_the_first_update_and_after_each(tmp_path):
    seen = []

    def measure(update):
        seen.append((update, len(rows(tmp_path)) if update > 1 else 0))

    train(tmp_path, measure=measure, log_every=1)
    assert seen == [(0, 0), (1, 0), (2, 2), (3, 3), (4, 4), (5, 5)]


def test_a_resumed_run_is_not_measured_at_its_beginning_again(tmp_path):
    seen = []

    def stopping(update):
        seen.append(update)
        if update == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, measure=stopping, checkpoint_every=1)
    assert seen == [0, 1, 2, 3]
    train(tmp_path, measure=seen.append, checkpoint_every=1, resume=True)
    assert seen == [0, 1, 2, 3, 3, 4, 5]


def test_the_loss_falls(tmp_path):
    train(tmp_path, num_updates=60, log_every=1)
    logged = [row["train/loss"] for row in rows(tmp_path)]
    assert logged[0] > 1
    assert logged[-1] < 0.05


def test_gradients_are_clipped_after_their_norm_is_logged(tmp_path):
    # AdamW's first steps are lr * g / (|g| + eps) whatever the gradient's size, so it takes a norm
    # below eps = 1e-5 to see them shrink.
    torch.manual_seed(0)
    start = nn.Sequential(nn.Dropout(), nn.Linear(3, 1))[1].weight
    moved = train(tmp_path / "a", num_updates=3, log_every=1)[0][1].weight
    assert not torch.equal(moved, start)
    clipped = train(tmp_path / "b", num_updates=3, log_every=1, max_grad_norm=1e-6)[0][1].weight
    assert (clipped - start).abs().max() < (moved - start).abs().max() / 5
    first, clipped_first = rows(tmp_path / "a")[0], rows(tmp_path / "b")[0]
    assert first["grad_norm/base"] == clipped_first["grad_norm/base"] > 0.1


@pytest.mark.parametrize("update", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run_naming_the_update(tmp_path, update):
    with pytest.raises(TrainingError, match=rf"update {update}: the loss is nan; lower optimizer"):
        train(tmp_path, broken_at=update, log_every=1)
    done = rows(tmp_path) if update > 1 else []
    assert [row["phase"] for row in done] == list(range(1, update))


def test_a_gradient_that_is_not_finite_stops_it_too(tmp_path):
    message = r"update 3: the loss is [\d.]+, its gradient norm base (inf|nan); lower optimizer"
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, spoiled_at=3, log_every=1)
    assert [row["phase"] for row in rows(tmp_path)] == [1, 2]


def test_updates_that_are_not_finite_are_left_out_and_counted(tmp_path, caplog):
    skip = {"on_nonfinite": "skip", "log_every": 1}
    broken, _ = train(tmp_path, broken_at=(2, 4), num_updates=5, **skip)
    assert broken[1].weight.isfinite().all()
    logged = rows(tmp_path)
    assert [row["train/skipped_steps"] for row in logged] == [0, 1, 1, 2, 2]
    assert [row["train/loss"] is None for row in logged] == [False, True, False, True, False]
    assert caplog.messages == [f"update {n}: the loss is nan; it is skipped" for n in (2, 4)]
    # The schedule goes on, so that a last update that is skipped is as if there had been none.
    cut, _ = train(tmp_path / "cut", num_updates=5, stop=lambda update: update == 4, **skip)
    last, _ = train(tmp_path / "last", num_updates=5, spoiled_at=5, **skip)
    assert torch.equal(cut[1].weight, last[1].weight)


def test_no_more_are_left_out_than_allowed(tmp_path):
    message = r"update 4: the loss is nan; stage\.max_skipped=1 updates were skipped already"
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, broken_at=(2, 4), on_nonfinite="skip", max_skipped=1)


def test_parts_of_a_loss_are_learned_one_by_one():
    weight = torch.tensor(3.0, requires_grad=True)
    before: list[float | None] = []

    def parts():
        for share in (0.25, 0.75):
            before.append(None if weight.grad is None else weight.grad.item())
            metrics = {"share": torch.tensor(share), "loss": share * weight.detach()}
            yield LossOutput(loss=share * weight**2, metrics=metrics)

    output = add_gradients(parts())
    assert before == [None, 1.5]  # the first part's are there before the second is computed
    assert weight.grad.item() == 6
    assert (output.loss.item(), output.loss.requires_grad) == (9, False)
    assert {name: value.item() for name, value in output.metrics.items()} == {
        "share": 1, "loss": 3,
    }  # fmt: skip
    for whole in (weight**2, LossOutput(loss=weight**2, metrics={"loss": weight.detach()})):
        assert add_gradients(whole).loss == 9
    assert weight.grad.item() == 18


def test_memory_that_runs_out_is_told_with_the_update(tmp_path):
    def grow(update):
        if update == 2:
            hooks.append(1)
        return False

    def allocate(module, args):
        if hooks:
            torch.empty(2**50)

    hooks: list[int] = []
    handle = nn.modules.module.register_module_forward_pre_hook(allocate)
    try:
        with pytest.raises(TrainingError) as raised:
            train(tmp_path, stop=grow, batch_size=16)
    finally:
        handle.remove()
    first, _, last = str(raised.value).splitlines()
    assert first == "update 3: learning: out of memory"
    assert "lower stage.batch_size (now 16)" in last


def test_a_run_repeats_and_dropout_draws_from_its_seed_alone(tmp_path):
    first = train(tmp_path / "a", dropout=0.5)[0][1].weight
    torch.rand(7)
    again = train(tmp_path / "b", dropout=0.5)[0][1].weight
    assert torch.equal(first, again)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    other = train(tmp_path / "c", dropout=0.5, seed=2)[0][1].weight
    assert not torch.equal(first, other)


def test_the_global_generator_is_left_as_it_was(tmp_path):
    train(tmp_path / "a", dropout=0.5)
    expected = torch.random.get_rng_state()
    torch.manual_seed(0)
    nn.Linear(3, 1)  # what `train` itself draws
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_it_is_asked_after_each_update_whether_it_was_the_last(tmp_path):
    done = []

    def third(update):
        done.append(update)
        return update == 3

    _, asked = train(tmp_path, log_every=1, stop=third)
    assert done == asked == [1, 2, 3]
    assert [row["phase"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_stop_sees_the_weights_after_the_update(tmp_path):
    """A run that is stopped is as far as one that was to be so long, but for its schedule."""
    stopped = train(tmp_path / "a", num_updates=9, log_every=9, stop=lambda update: update == 2)
    assert not (tmp_path / "a").exists()  # neither the last update nor one to log
    whole = train(tmp_path / "b", num_updates=9, log_every=1, stop=lambda update: update == 2)
    assert torch.equal(stopped[0][1].weight, whole[0][1].weight)
    shorter = train(tmp_path / "c", num_updates=9, log_every=1, stop=lambda update: update == 1)
    assert not torch.equal(stopped[0][1].weight, shorter[0][1].weight)


def test_what_a_stop_draws_changes_no_dropout_if_its_generator_is_its_own(tmp_path):
    def draws(update):
        torch.rand(3, generator=torch.Generator().manual_seed(update))
        return False

    plain = train(tmp_path / "a", dropout=0.5)[0][1].weight
    drawn = train(tmp_path / "b", dropout=0.5, stop=draws)[0][1].weight
    assert torch.equal(plain, drawn)


def test_the_last_batch_of_an_epoch_counts_as_an_update():
    assert Supervised(epochs=3, batch_size=10).num_updates(20) == 6
    assert Supervised(epochs=3, batch_size=10).num_updates(21) == 9
    assert Supervised(epochs=3, batch_size=10).num_updates(1) == 3


def test_a_schedule_must_be_shorter_than_the_updates():
    stage = Supervised(epochs=3, batch_size=10)
    assert stage.check_updates(WarmupDecay(warmup_steps=8), 21) == []
    assert stage.check_updates(Constant(), 1) == []
    assert stage.check_updates(WarmupDecay(warmup_steps=9), 21) == [
        "schedule.warmup_steps=9 must be below the number of updates (stage.epochs x examples /"
        " stage.batch_size)=9: lower the first or raise the second"
    ]


@pytest.mark.parametrize("at", [3, 4, 6])
def test_a_run_that_was_killed_goes_on_bit_by_bit_dropout_included(tmp_path, at):
    """Checkpoints at 2, 4 ... within and at the end of an epoch of three batches."""

    def killed(update):
        if update == at:
            raise KeyboardInterrupt
        return False

    options = {"num_updates": 7, "log_every": 1, "dropout": 0.5, "checkpoint_every": 2}
    whole, _ = train(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop=killed, **options)
    torch.rand(9)
    resumed, asked = train(tmp_path / "cut", resume=True, **options)
    assert len(asked) == 7 - (at - 1) // 2 * 2
    assert torch.equal(resumed[1].weight, whole[1].weight)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_run_that_had_ended_does_not_begin_again(tmp_path):
    options = {"num_updates": 9, "log_every": 1, "checkpoint_every": 4}
    first, _ = train(tmp_path, stop=lambda update: update == 3, **options)
    before = rows(tmp_path)
    again, asked = train(tmp_path, resume=True, **options)
    assert asked == []
    assert torch.equal(first[1].weight, again[1].weight)
    assert rows(tmp_path) == before


def test_a_checkpoint_of_another_model_or_of_other_inputs_is_refused(tmp_path):
    def state(width, inputs):
        model = nn.Linear(width, 1)
        adamw = AdamWSettings().build(model)
        return SupervisedState(
            network=model, optimizer=adamw, scheduler=Constant().build(adamw, total_steps=1),
            batches=BatchStream(shuffle_batches, range(4), 2, torch.Generator()), inputs=inputs,
        )  # fmt: skip

    saved = state(3, {"task": "a"})
    saved.update = 5
    checkpoint = through_a_file(saved.state_dict(), tmp_path)
    with pytest.raises(ConfigError, match=r"^task: the files that it names have changed"):
        state(3, {"task": "b"}).load_state_dict(checkpoint)
    with pytest.raises(ConfigError, match="other trained weights"):
        state(4, {"task": "a"}).load_state_dict(checkpoint)
    same = state(3, {"task": "a"})
    same.load_state_dict(checkpoint)
    assert same.update == 5
    assert torch.equal(same.network.weight, saved.network.weight)
