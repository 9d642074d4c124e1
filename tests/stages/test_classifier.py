"""Training of a classifier: it learns, it reloads as a reward, and its crops are what they say."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from rlhf_exp.models.classifiers import class_logits, with_leading_bos
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.scratch import ScratchClassifier
from rlhf_exp.rewards.classifier import Classifier
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.classifier import (
    EncodedTexts,
    TrainClassifier,
    encode_labelled,
    held_out_metrics,
)
from rlhf_exp.tasks.prefix import Prefix
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.types import Completions

from ..builders import completions
from ..rl.toy import ToyTask, context, parts_of

MODEL = ScratchClassifier(d_model=16, context_len=16)


def test_it_learns_and_serves_as_a_reward(tmp_path: Path) -> None:
    stage = TrainClassifier(epochs=30, batch_size=16, crop_min_tokens=2)
    optimizer = AdamWSettings(base_lr=1e-2, head_lr=1e-2)
    taken = parts_of(stage, model=MODEL, optimizer=optimizer)
    result = stage.run(context(tmp_path), taken)
    assert {*result.after} == {*stage.metric_names(taken)}
    assert result.after["heldout/accuracy"] == 1.0
    tokenizer = ToyTask().build_tokenizer()
    prompts = encode_prompts(tokenizer, ["w1", "w10"], prepend_bos=True)
    record = Completions(
        prompts=prompts,
        tokens=torch.tensor([[6, 7], [6, 7]]),
        mask=torch.ones(2, 2, dtype=torch.bool),
        texts=(" w2 w3", " w2 w3"),
    )
    reward = Classifier(name=str(tmp_path), label="high").load(torch.device("cpu"))
    low, high = reward(record).tolist()
    assert low < 0.1
    assert high > 0.9


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_pretrained_model_learns_in_bf16_and_serves_as_a_reward(
    architecture: str, tmp_path: Path
) -> None:
    config = hf.AutoConfig.for_model(
        architecture, vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20,
    )  # fmt: skip
    hf.AutoModel.from_config(config).save_pretrained(tmp_path / "body")
    ToyTask().build_tokenizer().save_pretrained(tmp_path / "body")
    model = Pretrained(base_model=str(tmp_path / "body"))
    stage = TrainClassifier(epochs=12, batch_size=16, crop_min_tokens=2, dtype="bf16")
    optimizer = AdamWSettings(base_lr=1e-2, head_lr=1e-2)
    taken = parts_of(stage, model=model, optimizer=optimizer)
    assert stage.check(taken) == []
    result = stage.run(context(tmp_path / "run"), taken)
    assert result.after["heldout/accuracy"] >= 0.95
    reward = Classifier(name=str(tmp_path / "run"), label="high").load(torch.device("cpu"))
    low, high = reward(completions([" w2 w1", " w2 w10"], before=["w1", "w10"])).tolist()
    assert low < 0.2
    assert high > 0.8


def test_a_model_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    def problems(**options: str) -> list[str]:
        model = Pretrained(base_model=str(tmp_path), **options)
        return TrainClassifier().check(parts_of(TrainClassifier(), model=model))

    with pytest.raises(ConfigError, match="is a directory without a model"):
        problems()
    MODEL.classifier(ToyTask().build_tokenizer(), ("a", "b"), seed=0).save_pretrained(tmp_path)
    assert problems() == []
    assert "weights that are trained must be fp32" in problems(dtype="bf16")[0]
    assert "stage=classifier trains with engine=fast" in problems(engine="hooked")[0]


def test_two_runs_are_equal(tmp_path: Path) -> None:
    stage = TrainClassifier(batch_size=16, token_noise=0.1)
    for name in "ab":
        stage.run(context(tmp_path / name), parts_of(stage, model=MODEL, optimizer=AdamWSettings()))
    a, b = (tmp_path / n / "model" / "model.safetensors" for n in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_held_out_metrics_by_hand() -> None:
    tokenizer = with_leading_bos(ToyTask().build_tokenizer())
    network = MODEL.classifier(tokenizer, ("high", "low"), seed=3)
    texts = ToyTask().labelled_split().held_out
    data = encode_labelled(tokenizer, texts, ("high", "low"), limit=16)
    assert data.rows[0] == [1, *tokenizer(texts[0].text, add_special_tokens=False)["input_ids"]]
    right, loss = 0, 0.0
    network.eval()
    for row, target in zip(data.rows, data.targets, strict=True):
        logits = network(input_ids=torch.tensor([row])).logits[0].double()
        right += int(logits[target] > logits[1 - target])
        loss -= logits.log_softmax(-1)[target].item()
    metrics = held_out_metrics(network.train(), data, batch_size=5)
    assert metrics["heldout/accuracy"] == pytest.approx(right / len(texts))
    assert metrics["heldout/loss"] == pytest.approx(loss / len(texts), abs=1e-5)
    assert 0 < right < len(texts)


def test_padding_changes_no_logit() -> None:
    tokenizer = with_leading_bos(ToyTask().build_tokenizer())
    network = MODEL.classifier(tokenizer, ("high", "low"), seed=3).eval()
    rows = [[1, 4, 5], [1, 6, 7, 8, 9, 10]]
    together = class_logits(network, rows)
    alone = torch.cat([class_logits(network, [row]) for row in rows])
    torch.testing.assert_close(together, alone)


def disturbed(stage: TrainClassifier, row: list[int], times: int) -> list[list[int]]:
    network = MODEL.classifier(ToyTask().build_tokenizer(), ("a", "b"), seed=0)
    generator = torch.Generator().manual_seed(0)
    return [stage._disturb(row, network, generator) for _ in range(times)]


def test_crops_are_prefixes_of_the_stated_lengths_and_share() -> None:
    row = list(range(4, 14))
    rows = disturbed(TrainClassifier(crop_fraction=0.5, crop_min_tokens=4), row, 2000)
    assert all(r == row[: len(r)] for r in rows)
    lengths = [len(r) for r in rows]
    assert set(lengths) == set(range(4, 11))
    # A crop is uniform over 4 .. 10 and keeps the whole text in one case of seven.
    assert sum(n < 10 for n in lengths) / 2000 == pytest.approx(0.5 * 6 / 7, abs=0.04)
    assert disturbed(TrainClassifier(crop_min_tokens=20), row, 20) == [row] * 20


def test_noise_replaces_the_stated_share() -> None:
    row = [4] * 10
    rows = disturbed(TrainClassifier(crop_fraction=0.0, token_noise=0.3), row, 400)
    changed = sum(token != 4 for r in rows for token in r) / 4000
    assert changed == pytest.approx(0.3 * 15 / 16, abs=0.03)


def test_a_task_without_labels_is_refused() -> None:
    stage = TrainClassifier()
    taken = vars(parts_of(stage, model=MODEL))
    [problem] = stage.check_kinds({**taken, "task": Prefix()})
    assert problem.startswith("stage=classifier needs labelled")
    assert not stage.check_kinds(taken)


def test_encoded_texts_are_cut_to_the_limit() -> None:
    tokenizer = with_leading_bos(ToyTask().build_tokenizer())
    data = encode_labelled(
        tokenizer, ToyTask().labelled_split().train[:3], ("high", "low"), limit=3
    )
    assert isinstance(data, EncodedTexts)
    assert [len(row) for row in data.rows] == [3, 3, 3]
