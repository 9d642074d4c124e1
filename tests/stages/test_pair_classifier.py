"""A classifier trained on pairs: it learns, and reward=pair_model reads what it read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from pydantic import ValidationError

from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.pair_model import PairModel
from rlhf_exp.rewards.reward_model import LearnedReward
from rlhf_exp.rewards.sequence_classifier import SequenceClassifier
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.pair_classifier import ClassifierPairs, encode_texts, load_pair_classifier
from rlhf_exp.stages.reward_model import TrainRewardModel
from rlhf_exp.tasks.protocol import Pair
from rlhf_exp.tasks.tokenizers import closed_word_tokenizer
from rlhf_exp.training.optim import AdamWSettings

from ..builders import completions, stretch
from ..gguf_files import write_gguf
from ..rl.toy import ToyPairs, ToyTask, context, parts_of, rows

CPU = torch.device("cpu")
EOS = 2
SHORT = {"epochs": 1, "batch_size": 40, "log_every": 1}


@dataclass(frozen=True)
class TextPairs(ToyPairs):
    """Pairs for a tokenizer that decides about BOS by itself."""

    prepend_bos: bool = False


def save_body(path: Path, architecture: str, **settings: Any) -> Pretrained:
    """A tiny pretrained model that is not a classifier yet."""
    config = hf.AutoConfig.for_model(
        architecture, vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20, pad_token_id=0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.AutoModel.from_config(config).save_pretrained(path)
    ToyTask().build_tokenizer().save_pretrained(path)
    return Pretrained(base_model=str(path))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return save_body(tmp_path_factory.mktemp("bert"), "bert")


def train(
    path: Path, model: Pretrained, *, task: Any = None, seed: int = 1,
    base_lr: float = 1e-2, head_lr: float = 1e-2, **options: Any,
) -> dict[str, float]:  # fmt: skip
    stage = TrainRewardModel(head="classifier", **{**SHORT, **options})
    optimizer = AdamWSettings(base_lr=base_lr, head_lr=head_lr)
    taken = parts_of(stage, task=task or TextPairs(), model=model, optimizer=optimizer)
    assert stage.check(taken) == stage.check_texts(taken) == []
    return dict(stage.run(context(path, seed), taken).after)


def losses(path: Path) -> list[float]:
    return [row["train/loss"] for row in rows(path) if "train/loss" in row]


def loaded(model: Pretrained, *, batch_size: int = 7) -> SequenceClassifier:
    """The classifier before training, with weights far from their small initial ones."""
    classifier = load_pair_classifier(model, batch_size=batch_size, device=CPU, seed=0)
    stretch(classifier.model, seed=0)
    return classifier


@pytest.mark.parametrize("loss", ["mse_rank", "rank"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_it_learns_and_its_reward_has_the_reported_scores(
    architecture: str, loss: str, tmp_path: Path
) -> None:
    model = save_body(tmp_path / "body", architecture)
    task = TextPairs(count=900, rewarded=loss == "mse_rank")
    after = train(tmp_path / "run", model, task=task, loss=loss, epochs=8, eval_every=20)
    assert after["heldout/pair_accuracy"] > 0.9
    if loss == "mse_rank":
        assert after["heldout/mse"] < 0.5 * after["heldout/reward_variance"]
    config = hf.AutoConfig.from_pretrained(tmp_path / "run/model")
    assert (config.num_labels, config.problem_type) == (1, None)
    reward = PairModel(name=str(tmp_path / "run"), batch_size=5).load(CPU)
    samples = rows(tmp_path / "run", "samples.jsonl")
    for answer in ("chosen", "rejected"):
        record = completions([s[answer] for s in samples], before=[s["prompt"] for s in samples])
        written = [s[f"{answer}_score"] for s in samples]
        assert reward(record).tolist() == pytest.approx(written, abs=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_each_answer_is_scored_as_by_itself(architecture: str, tmp_path: Path) -> None:
    classifier = loaded(save_body(tmp_path, architecture))
    pairs = TextPairs().pair_split().held_out[:11]
    assert len({pair.chosen_ended for pair in pairs}) == 2  # EOS follows all the same
    data = ClassifierPairs(
        classifier, encode_texts(classifier, pairs, ["?"] * len(pairs)), dtype="fp32"
    )
    network = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    network.load_state_dict(classifier.model.state_dict())
    vocab = classifier.tokenizer.get_vocab()

    @torch.no_grad()
    def alone(text: str) -> float:
        row = torch.tensor([[*(vocab[word] for word in text.split()), EOS]])
        return network.eval()(row, attention_mask=torch.ones_like(row)).logits.item()

    for scores, answers in zip(
        data.all_scores(), ([p.chosen for p in pairs], [p.rejected for p in pairs]), strict=True
    ):
        expected = [alone(pair.prompt + text) for pair, text in zip(pairs, answers, strict=True)]
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
        assert torch.tensor(expected).std() > 1e-2
    picked = data.scores(torch.tensor([4, 9]))
    assert picked[1].tolist() == pytest.approx(data.all_scores()[1][[4, 9]].tolist(), abs=1e-5)
    assert picked[0].requires_grad


def test_a_long_text_loses_its_beginning(
    bert: Pretrained, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = loaded(bert)
    vocab = classifier.tokenizer.get_vocab()
    words = [f"w{i % 12}" for i in range(30)]
    pairs = [Pair(" ".join(words), " w1", " w2"), Pair("w3", " w4", " w5")]
    encoded = encode_texts(classifier, pairs, ["?"] * 2)
    assert encoded[0].rejected == [*(vocab[word] for word in [*words[-18:], "w2"]), EOS]
    assert encoded[1].chosen == [vocab["w3"], vocab["w4"], EOS]
    assert "1 of 2 pairs have a text that fills the model's 20 tokens" in caplog.text


@pytest.mark.parametrize("still", ["base_lr", "head_lr"])
def test_body_and_head_have_their_own_rates(still: str, bert: Pretrained, tmp_path: Path) -> None:
    train(tmp_path, bert, **{still: 0.0})
    before = load_pair_classifier(bert, batch_size=1, device=CPU, seed=0).model.base_model
    after = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    weights = after.base_model.state_dict()
    changed = [n for n, w in before.state_dict().items() if not torch.equal(w, weights[n])]
    assert ("encoder.layer.0.attention.self.query.weight" in changed) == (still == "head_lr")
    assert (changed == []) == (still == "base_lr")
    assert (after.classifier.bias.item() == 0.0) == (still == "head_lr")


def test_bf16_trains_nearly_alike_and_saves_fp32(bert: Pretrained, tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        train(tmp_path / dtype, bert, dtype=dtype)
    full, half = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert half != full
    assert half == pytest.approx(full, rel=0.1)
    saved = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bf16/model")
    assert saved.dtype == torch.float32


def test_the_head_is_drawn_from_the_runs_seed(bert: Pretrained, tmp_path: Path) -> None:
    # One batch of all pairs: nothing else of the first loss depends on the seed.
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, bert, seed=seed, batch_size=1000)
        torch.rand(3)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a")[0] != pytest.approx(losses(tmp_path / "c")[0], rel=1e-3)


def test_a_gguf_file_is_trained_on(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama")
    model = Pretrained(base_model=str(tmp_path / "model.gguf"))
    train(tmp_path / "run", model, task=TextPairs(count=60))
    assert PairModel(name=str(tmp_path / "run")).load(CPU)(completions([" good"])).isfinite().all()


@pytest.mark.parametrize(
    "changed",
    [{"width": 16}, {"read_layers": 1}, {"keep_features": False},
     {"unfreeze_layers": 1, "keep_features": False}],
)  # fmt: skip
def test_keys_of_the_other_heads_are_refused(changed: dict[str, Any]) -> None:
    named = ", ".join(f"{key}={value}" for key, value in changed.items())
    with pytest.raises(ValidationError, match=f"trains a whole model: leave out {named}, which"):
        TrainRewardModel(head="classifier", **changed)


def test_what_does_not_fit_is_said(bert: Pretrained, tmp_path: Path) -> None:
    stage = TrainRewardModel(head="classifier")
    fitting = parts_of(stage, task=TextPairs(), model=bert)

    def problems(**replaced: Any) -> list[str]:
        return stage.check(replace(fitting, **replaced))

    assert problems() == []
    [problem] = problems(model=Scratch())
    assert problem.startswith("model: stage.head=classifier needs a saved model")
    [problem] = problems(task=TextPairs(prepend_bos=True))
    assert problem.startswith("task.prepend_bos=true is not for stage.head=classifier")
    [problem] = problems(model=replace(bert, dtype="bf16"))
    assert "weights that are trained must be fp32" in problem
    with pytest.raises(ConfigError, match="is a directory without a model"):
        problems(model=Pretrained(base_model=str(tmp_path)))


def test_a_text_that_the_tokenizer_cannot_read_is_named(tmp_path: Path) -> None:
    model = save_body(tmp_path / "body", "bert")
    tokenizer = closed_word_tokenizer(["w0"], pad="<pad>", eos="<eos>")
    tokenizer.save_pretrained(tmp_path / "body")
    message = r"task.path: row 0: the tokenizer of model.base_model='.*' cannot read the prompt"
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()


def test_the_other_reward_says_which_one_reads_it(bert: Pretrained, tmp_path: Path) -> None:
    train(tmp_path, bert)
    with pytest.raises(ConfigError, match=r"stage.head=classifier is for reward=pair_model"):
        LearnedReward(path=str(tmp_path)).load(CPU)
