"""Supervised training of a language model: that it learns, stops, keeps the best and reloads."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.models.loading import Pretrained, load_language_model, load_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.held_out import HeldOut, held_out_loss
from rlhf_exp.stages.protocol import StageResult
from rlhf_exp.stages.sft import SFT
from rlhf_exp.tasks.examples import encode_demonstrations, encode_texts
from rlhf_exp.tasks.prefix import Prefix
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import WarmupDecay
from rlhf_exp.training.seeding import stream_seed
from tests.architectures import save

from ..rl.toy import ECHO, EchoTask, ToyTask, context, parts_of, rows, saved_model, train_echo

MODEL = Scratch(num_layers=2, d_model=32, num_heads=2, context_len=16)
SMALL = Scratch(num_layers=1, d_model=16, num_heads=2, context_len=16, dropout=0.2)


def train(path: Path, stage: SFT, **replaced: Any) -> StageResult:
    defaults = {"model": SMALL, "optimizer": AdamWSettings()}
    given = context(path)
    result = stage.run(given, parts_of(stage, **{**defaults, **replaced}))
    given.presentation.show()
    return result


def weights(path: Path) -> bytes:
    return (path / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_it_learns_the_texts_and_saves_a_model_that_reloads(tmp_path: Path, layout: str) -> None:
    stage = SFT(epochs=20, batch_size=8, log_every=100, layout=layout)
    optimizer = AdamWSettings(base_lr=1e-2, weight_decay=0.1)
    schedule = WarmupDecay(warmup_steps=10)
    result = train(tmp_path, stage, model=MODEL, optimizer=optimizer, schedule=schedule)
    assert {*result.after} == {*stage.metric_names(parts_of(stage))}
    # Two words are uniform over twelve, the third is the first again, and then the text ends.
    floor = 2 * math.log(12) / 4
    assert result.after["heldout/loss"] < floor + 0.55
    assert result.after["heldout/perplexity"] == pytest.approx(
        math.exp(result.after["heldout/loss"])
    )
    network, tokenizer = load_language_model(str(tmp_path))
    assert tokenizer.decode([4, 5]) == "w0 w1"
    examples = encode_texts(tokenizer, ToyTask().language_split().held_out, limit=16)
    reloaded = held_out_loss(network, examples, batch_size=16)
    assert reloaded == pytest.approx(result.after["heldout/loss"], abs=1e-6)
    logged = rows(tmp_path)
    assert [row["phase"] for row in logged] == [100, 200, 280, 280]
    assert logged[0]["train/loss"] > logged[-2]["train/loss"]
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_packed_and_padded_batches_teach_the_same(tmp_path: Path) -> None:
    # One batch holds all examples, so that both see the same ones, of unlike lengths.
    for layout in ("pad", "pack"):
        train_echo(tmp_path / layout, layout=layout, batch_size=200, epochs=5, log_every=1)
    padded, packed = (
        [row["train/loss"] for row in rows(tmp_path / layout)[:-1]] for layout in ("pad", "pack")
    )
    assert packed == pytest.approx(padded, abs=1e-4)
    assert padded[0] > padded[-1] + 0.1
    assert weights(tmp_path / "pad") != weights(tmp_path / "pack")  # sums in another order


def test_packing_is_refused_where_examples_would_see_each_other(tmp_path: Path) -> None:
    model = Pretrained(base_model=str(save("opt", tmp_path / "opt")))
    with pytest.raises(ConfigError, match=r"stage\.layout=pack: .* in OPTForCausalLM; set stage"):
        train(tmp_path, SFT(layout="pack"), model=model)
    train(tmp_path, SFT(layout="pad", max_updates=1), model=model)


def test_a_model_that_is_wrong_when_padded_is_not_trained(tmp_path: Path) -> None:
    model = Pretrained(base_model=str(save("rwkv", tmp_path / "rwkv")))
    with pytest.raises(ConfigError, match="RwkvForCausalLM is not supported"):
        train(tmp_path, SFT(), model=model)


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_padded_batches_are_of_like_lengths_and_packed_ones_of_any(
    tmp_path: Path, layout: str
) -> None:
    network, tokenizer = ECHO.language_model(EchoTask().build_tokenizer, seed=0)
    examples = encode_demonstrations(
        tokenizer, EchoTask().demonstration_split().train, prepend_bos=True, limit=16
    )
    batches: list[list[int]] = []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"].flatten().tolist()),
        with_kwargs=True,
    )
    stage, given = SFT(batch_size=16, layout=layout), context(tmp_path)
    losses = stage.losses(network, examples, stage.batches(given, examples))
    for _ in range(6):
        next(losses)
    lengths = []
    for tokens in batches:
        ends = [i for i, token in enumerate(tokens) if token == 2]
        starts = [i for i, token in enumerate(tokens) if token == 1]
        lengths.append({end - start for start, end in zip(starts, ends, strict=True)})
        assert len(ends) == 16
    # Answers are of one word or of two. One batch may have the last short and the first long ones.
    mixed = sum(len(of) == 2 for of in lengths)
    assert mixed <= 1 if layout == "pad" else mixed == 6


def test_the_loss_of_an_update_is_that_of_the_answers_alone(tmp_path: Path) -> None:
    train_echo(tmp_path, batch_size=200, epochs=1, log_every=1)
    network, tokenizer = ECHO.language_model(
        EchoTask().build_tokenizer, seed=stream_seed(1, "model")
    )
    losses = []
    for prompt, response in EchoTask().demonstration_split().train:
        before, answer = (tokenizer(t, add_special_tokens=False)["input_ids"]
                          for t in (prompt, response))  # fmt: skip
        ids = [1, *before, *answer, 2]
        logits = network.eval()(input_ids=torch.tensor([ids])).logits[0].double()
        for i in range(3, len(ids)):
            losses.append(-logits[i - 1].log_softmax(-1)[ids[i]].item())
    assert rows(tmp_path)[0]["train/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_it_stops_at_the_first_rate_that_is_enough_and_saves_that_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train_echo(tmp_path, eval_every=12, eval_samples=10, stop_at=0.6)
    measured = [row for row in rows(tmp_path) if "heldout/perplexity" not in row]
    rates = [row["heldout/exact_match"] for row in measured if "heldout/loss" in row]
    assert len(rates) > 2
    assert max(rates[:-1]) < 0.6 <= rates[-1]
    assert measured[-1]["phase"] == 12 * len(rates) < 180
    assert "was not reached" not in caplog.text
    policy = load_policy(tmp_path)
    split = EchoTask().demonstration_split()
    examples = encode_demonstrations(policy.tokenizer, split.held_out, prepend_bos=True, limit=16)
    held_out = HeldOut(policy, examples, num_samples=10, chooses=True, batch_size=16, seed=1)
    held_out.with_answers(EchoTask(), [d.prompt for d in split.held_out])
    assert held_out.during()["heldout/exact_match"] == rates[-1]
    assert held_out.final() == pytest.approx(result.after, abs=1e-6)
    stage = SFT(data="demonstrations")
    assert {*result.after} == {*stage.metric_names(parts_of(stage, task=EchoTask()))}
    assert 0 < result.after["heldout/exact_match"] < 1
    assert rows(tmp_path)[-1] == {"phase": 12 * len(rates), **result.after}


@pytest.mark.usefixtures("unchecked")
def test_the_best_model_is_saved_and_not_the_last(tmp_path: Path) -> None:
    """At a learning rate that is far too high the loss is lowest at the beginning."""
    wild = AdamWSettings(base_lr=0.3)
    stage = SFT(batch_size=8, epochs=2, eval_every=2, log_every=1)
    result = train(tmp_path, stage, model=MODEL, optimizer=wild)
    losses = [row["heldout/loss"] for row in rows(tmp_path)[:-1] if "heldout/loss" in row]
    assert len(losses) == 14
    assert min(losses) < losses[-1] - 0.01
    assert result.after["heldout/loss"] == pytest.approx(
        min(losses), abs=1e-6
    )  # all 36 held-out texts measure it both times
    network, tokenizer = load_language_model(str(tmp_path))
    examples = encode_texts(tokenizer, ToyTask().language_split().held_out, limit=16)
    assert held_out_loss(network, examples, batch_size=8) == pytest.approx(min(losses), abs=1e-6)


def test_a_rate_that_is_not_reached_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_echo(tmp_path, eval_every=5, stop_at=0.99, max_updates=7)
    [warning] = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "stage.stop_at=0.99 was not reached: the best" in warning.getMessage()
    assert "after 7 updates" in warning.getMessage()


def test_updates_are_at_most_so_many(tmp_path: Path) -> None:
    assert SFT(batch_size=16, epochs=2).num_updates(33) == 6
    assert SFT(batch_size=16, epochs=2, max_updates=5).num_updates(33) == 5
    assert SFT(batch_size=16, epochs=2, max_updates=7).num_updates(33) == 6
    train(tmp_path, SFT(batch_size=16, max_updates=3, log_every=1))
    assert [row["phase"] for row in rows(tmp_path)] == [1, 2, 3, 3]


def test_time_is_up_after_the_update_at_hand(tmp_path: Path) -> None:
    result = train(tmp_path, SFT(batch_size=16, max_seconds=1e-9, log_every=1))
    assert [row["phase"] for row in rows(tmp_path)] == [1, 1]
    assert rows(tmp_path)[1] == {"phase": 1, **result.after}


@pytest.mark.usefixtures("unchecked")
def test_two_runs_are_equal_and_another_seed_is_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_echo(tmp_path / name, seed=seed, eval_every=3, max_updates=7)
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


@pytest.mark.usefixtures("unchecked")
def test_measuring_changes_nothing_of_the_training(tmp_path: Path) -> None:
    for name, eval_every in (("never", None), ("often", 2)):
        stage = SFT(data="demonstrations", batch_size=16, log_every=1, eval_every=eval_every)
        train(tmp_path / name, stage, task=EchoTask())
    never, often = (
        [row["train/loss"] for row in rows(tmp_path / name) if "train/loss" in row]
        for name in ("never", "often")
    )
    assert never == often
    assert len(never) == 6


def test_half_precision_is_for_the_forward_pass_alone(tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        train(tmp_path / dtype, SFT(batch_size=16, log_every=1, dtype=dtype), model=MODEL)
    full, half = (
        [row["train/loss"] for row in rows(tmp_path / d) if "train/loss" in row]
        for d in ("fp32", "bf16")
    )
    # bfloat16 has 8 bits of precision.
    assert half == pytest.approx(full, rel=2e-2)
    assert half[0] != full[0]
    network, _ = load_language_model(str(tmp_path / "bf16"))
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert any((p != p.bfloat16().float()).any() for p in network.parameters())


def test_half_precision_does_not_round_logits(tmp_path: Path) -> None:
    # Logits around -100, where bf16 has steps of one half.
    saved = saved_model(tmp_path / "base")
    network, _ = load_language_model(saved.base_model)
    with torch.no_grad():
        network.transformer.wte.weight[:, 0] = 10
        network.transformer.ln_f.weight[0] = 0
        network.transformer.ln_f.bias[0] = -10
    network.save_pretrained(saved.base_model)
    losses = []
    for dtype in ("fp32", "bf16"):
        stage = SFT(batch_size=16, log_every=1, max_updates=1, dtype=dtype)
        train(tmp_path / dtype, stage, model=saved)
        losses += [row["train/loss"] for row in rows(tmp_path / dtype) if "train/loss" in row]
    full, half = losses
    assert half == pytest.approx(full, abs=5e-3)
    assert half != full


def test_what_does_not_fit_is_said() -> None:
    def check(stage: SFT, **replaced: Any) -> list[str]:
        return stage.check(parts_of(stage, **replaced))

    problems = check(SFT(), task=Prefix(), model=Scratch(engine="hooked"))
    assert problems[0].startswith("stage=sft needs a task with texts")
    assert problems[1].startswith("model.engine=hooked is for stage=ppo")
    assert not check(SFT())
    answers = SFT(data="demonstrations", stop_at=0.5, eval_every=1)
    assert not check(answers, task=EchoTask())
    problems = check(answers)
    assert problems[0].startswith("stage.data=demonstrations needs a task with answers")
    assert problems[1].startswith("stage.stop_at needs a task with exact answers")
    assert len(problems) == 2


@pytest.mark.parametrize(
    "options", [{"data": "demonstrations"}, {"eval_every": 5}, {}], ids=["never", "texts", "both"]
)
def test_nothing_stops_at_a_rate_that_is_not_measured(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"stop_at=0.9 is a measured exact-match rate: set"):
        SFT(stop_at=0.9, **options)


def test_a_schedule_longer_than_the_training_is_refused(tmp_path: Path) -> None:
    long = WarmupDecay(warmup_steps=50)

    def check(stage: SFT, task: ToyTask) -> list[str]:
        return stage.check_texts(parts_of(stage, task=task, schedule=long))

    with pytest.raises(ConfigError, match=r"schedule: warmup_steps=50 .* total_steps=7"):
        train(tmp_path, SFT(batch_size=16), schedule=long)
    assert not check(SFT(batch_size=16, epochs=10), ToyTask())
    [problem] = check(SFT(batch_size=16, epochs=10, max_updates=50), ToyTask())
    assert problem.startswith("schedule.warmup_steps=50 must be below the number of updates")
    answers = SFT(batch_size=2, data="demonstrations")  # 48 updates, and 54 of texts
    assert check(answers, EchoTask())
    assert not check(SFT(batch_size=2), EchoTask())


def test_a_demonstration_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    short = Scratch(num_layers=1, d_model=16, num_heads=2, context_len=5)
    with pytest.raises(ConfigError, match=r"a demonstration of 6 tokens exceeds .* context of 5"):
        train(tmp_path, SFT(data="demonstrations"), task=EchoTask(), model=short)
    assert not [*tmp_path.iterdir()]


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    class NoEos(ToyTask):
        def build_tokenizer(self):  # type: ignore[no-untyped-def]
            tokenizer = super().build_tokenizer()
            tokenizer.eos_token = None
            return tokenizer

    with pytest.raises(ConfigError, match="stage=sft needs a tokenizer with an EOS token"):
        train(tmp_path, SFT(), task=NoEos())
