"""The forward KL and the loss on a text file, against a loop in float64."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.models.finetune import Finetune, Full, Lora
from rlhf_exp.models.lora import adapter_off
from rlhf_exp.rl import eval_text
from rlhf_exp.rl.eval_text import TextFile, text_metrics
from rlhf_exp.rl.setup import Setup, load_setup
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.tokenizers import closed_word_tokenizer

from .fixed import perturb
from .toy import RAGGED, ToyTask, context, parts, ppo_with, rows, saved_model

TEXTS = ("w0 w5 w7", "", "w3", "  w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w0 w1 w2 w3 w4 w5 w6  ")
SMALL = ppo_with(
    total_phases=2, batch_size=8, num_minibatches=2, eval_every=1, eval_samples=4,
    histograms_every=None, dtype="fp32",
)  # fmt: skip


def write(path: Path, *texts: str) -> TextFile:
    path.write_text("\n".join(texts))
    return TextFile(str(path))


def loaded(path: Path, **replaced: Any) -> Setup:
    file = write(path / "texts.txt", *TEXTS)
    model = saved_model(path / "base", architecture="llama")
    p = parts(**{"task": RAGGED, "model": model, **replaced})
    return load_setup(
        context(path), p.task, p.model, p.reward, p.sampler, p.finetune, eval_text=file
    )


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("finetune", [Full(), Lora(rank=2)], ids=["full", "lora"])
def test_they_equal_a_loop_over_tokens(
    finetune: Finetune, prepend_bos: bool, tmp_path: Path
) -> None:
    task = ToyTask(prompts=RAGGED.prompts, prepend_bos=prepend_bos)
    setup = loaded(tmp_path, finetune=finetune, task=task)
    assert setup.texts is not None
    untouched = text_metrics(setup.policy, setup.reference, setup.texts)
    assert untouched["eval/forward_kl"] == pytest.approx(0, abs=1e-6)
    perturb(setup.policy, scale=0.1, seed=1)
    kls, losses = [], []
    model = setup.policy.language_model
    for text in TEXTS:
        ids = setup.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        length = 15  # of the context's 16 tokens
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            whole = torch.tensor([[1, *piece] if prepend_bos else piece])
            with torch.no_grad():
                logp = model(input_ids=whole).logits[0].double().log_softmax(-1)
                if finetune == Full():
                    logits = setup.reference.language_model(input_ids=whole).logits
                else:
                    with adapter_off(model):
                        logits = model(input_ids=whole).logits
                logq = logits[0].double().log_softmax(-1)
            for t, token in enumerate(whole[0, 1:].tolist()):
                pairs = zip(logp[t].tolist(), logq[t].tolist(), strict=True)
                kls.append(sum(math.exp(q) * (q - p) for p, q in pairs))
                losses.append(-logp[t, token].item())
    found = text_metrics(setup.policy, setup.reference, setup.texts)
    assert len(losses) == (22 if prepend_bos else 18)
    assert found["eval/forward_kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert found["eval/text_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["eval/forward_kl"] > 0.01


def test_rows_at_a_time_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = loaded(tmp_path)
    perturb(setup.policy, scale=0.1, seed=1)
    whole = text_metrics(setup.policy, setup.reference, setup.texts)
    monkeypatch.setattr(eval_text, "ROWS", 1)
    assert text_metrics(setup.policy, setup.reference, setup.texts) == pytest.approx(whole)


def test_every_evaluation_of_a_run_has_them_and_nothing_else_changes(tmp_path: Path) -> None:
    file = write(tmp_path / "texts.txt", *TEXTS[:3])
    given = parts(task=RAGGED)
    for name, path in (("with", file.path), ("without", None)):
        ppo = replace(SMALL, eval_text=path)
        after = ppo.run(context(tmp_path / name), given).after
        assert {*after} == {*ppo.metric_names(given)}
    found, plain = (
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(tmp_path / n)]
        for n in ("with", "without")
    )
    assert not any("eval/text_loss" in row for row in plain)
    kls = [row.pop("eval/forward_kl") for row in found if "eval/kl" in row]
    losses = [row.pop("eval/text_loss") for row in found if "eval/kl" in row]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[2] > kls[1] > 1e-6
    assert len({*losses}) == 3
    assert found == plain


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (None, r"stage\.eval_text: cannot read .*texts\.txt \(No such file"),
        (("", " "), r"stage\.eval_text=.*texts\.txt: the file has no text"),
    ],
)
def test_a_file_without_texts_is_refused_before_a_model_is_loaded(
    texts: tuple[str, ...] | None, said: str, tmp_path: Path
) -> None:
    if texts is not None:
        write(tmp_path / "texts.txt", *texts)
    with pytest.raises(ConfigError, match=said):
        replace(SMALL, eval_text=str(tmp_path / "texts.txt")).check(parts())


def test_texts_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    policy = loaded(tmp_path).policy
    foreign = write(tmp_path / "foreign.txt", "w0 film", "w1 w2")
    closed = closed_word_tokenizer(["w0", "w1", "w2"], pad="<pad>", eos="<eos>")
    for tokenizer in (policy.tokenizer, closed):
        policy.tokenizer = tokenizer
        with pytest.raises(ConfigError, match=r"stage\.eval_text=.*does not know its words"):
            foreign.load(policy, prepend_bos=False)
    with pytest.raises(ConfigError, match=r"stage\.eval_text=.*no text has two tokens"):
        write(tmp_path / "short.txt", "w0", "w1").load(policy, prepend_bos=False)


def test_a_run_is_not_resumed_with_other_texts(tmp_path: Path) -> None:
    file = write(tmp_path / "texts.txt", *TEXTS[:3])
    ppo = replace(SMALL, eval_text=file.path)
    ppo.run(context(tmp_path / "run"), parts(task=RAGGED))
    write(tmp_path / "texts.txt", "w1 w2")
    with pytest.raises(ConfigError, match="eval_text: the files that it names have changed"):
        ppo.run(context(tmp_path / "run", resume=True), parts(task=RAGGED))
