"""Supervised training of a language model: the loss by hand, and that it learns and reloads."""

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_exp.models.loading import load_language_model
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.sft import SFT, encode_texts, held_out_loss, next_token_loss
from rlhf_exp.tasks.prefix import Prefix
from rlhf_exp.tasks.protocol import LabelledText
from rlhf_exp.training.optim import AdamWSettings, Constant, WarmupDecay

from .toy import ToyTask, context

MODEL = Scratch(num_layers=2, d_model=32, num_heads=2, context_len=16)
ROWS = [[1, 4, 5, 2], [1, 6, 2], [1, 7, 8, 9, 10, 2]]


def negative_log_probs(network: torch.nn.Module, row: list[int]) -> list[float]:
    logits = network(input_ids=torch.tensor([row])).logits[0].double()
    return [-logits[i].log_softmax(-1)[token].item() for i, token in enumerate(row[1:])]


def test_loss_is_the_mean_over_all_tokens_but_the_first_of_each_text() -> None:
    network, _ = MODEL.language_model(ToyTask().build_tokenizer, seed=0)
    network.eval()
    by_hand = [x for row in ROWS for x in negative_log_probs(network, row)]
    assert next_token_loss(network, ROWS).item() == pytest.approx(sum(by_hand) / 10, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_held_out_loss_depends_on_neither_batches_nor_dropout(batch_size: int) -> None:
    model = Scratch(d_model=32, num_heads=2, context_len=16, dropout=0.5)
    network, _ = model.language_model(ToyTask().build_tokenizer, seed=0)
    by_hand = [x for row in ROWS for x in negative_log_probs(network.eval(), row)]
    loss = held_out_loss(network.train(), ROWS, batch_size=batch_size)
    assert loss == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)


def test_texts_get_bos_and_eos_and_long_ones_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    texts = [LabelledText("low", "w0 w1"), LabelledText("low", "w0 w1 w2 w3 w4 w5")]
    with caplog.at_level("INFO"):
        rows = encode_texts(ToyTask().build_tokenizer(), texts, limit=6)
    assert rows == [[1, 4, 5, 2], [1, 4, 5, 6, 7, 2]]
    assert "1 of 2 texts are cut to 6 tokens" in caplog.text


def test_it_learns_the_texts_and_saves_a_model_that_reloads(tmp_path: Path) -> None:
    stage = SFT(epochs=20, batch_size=8, log_every=100)
    optimizer = AdamWSettings(base_lr=1e-2, weight_decay=0.1)
    result = stage.run(
        context(tmp_path),
        task=ToyTask(),
        model=MODEL,
        optimizer=optimizer,
        schedule=WarmupDecay(warmup_steps=10),
    )
    # Two words are uniform over twelve, the third is the first again, and then the text ends.
    floor = 2 * math.log(12) / 4
    assert result["after"]["heldout/loss"] < floor + 0.45
    assert result["after"]["heldout/perplexity"] == pytest.approx(
        math.exp(result["after"]["heldout/loss"])
    )
    network, tokenizer = load_language_model(str(tmp_path))
    assert tokenizer.decode([4, 5]) == "w0 w1"
    split = ToyTask().language_split()
    rows = encode_texts(tokenizer, split.held_out, limit=16)
    reloaded = held_out_loss(network, rows, batch_size=16)
    assert reloaded == pytest.approx(result["after"]["heldout/loss"], abs=1e-6)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in logged] == [100, 200, 280, 280]
    assert logged[0]["train/loss"] > logged[-2]["train/loss"]


def test_two_runs_are_equal(tmp_path: Path) -> None:
    dropout = MODEL.__class__(num_layers=1, d_model=16, num_heads=2, context_len=16, dropout=0.2)
    for name in "ab":
        SFT(batch_size=16).run(
            context(tmp_path / name),
            task=ToyTask(),
            model=dropout,
            optimizer=AdamWSettings(),
            schedule=Constant(),
        )
    a, b = (tmp_path / n / "model" / "model.safetensors" for n in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_what_does_not_fit_is_said() -> None:
    hooked = Scratch(engine="hooked")
    problems = SFT().check(task=Prefix(), model=hooked)
    assert problems[0].startswith("stage=sft needs a task with texts")
    assert problems[1].startswith("model.engine=hooked is for stage=ppo")
    assert not SFT().check(task=ToyTask(), model=MODEL)


def test_a_schedule_longer_than_the_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"schedule: warmup_steps=50 .* total_steps=7"):
        SFT(batch_size=16).run(
            context(tmp_path),
            task=ToyTask(),
            model=MODEL,
            optimizer=AdamWSettings(),
            schedule=WarmupDecay(warmup_steps=50),
        )
