"""Pairs whose prompts are conversations: every stage does with them what it does with the text that
the chat template makes of them."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.models.loading import Pretrained
from rlhf_exp.rewards.pair_model import PairModel
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.stopping import Interrupted, StopRequests
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.dpo import DPO
from rlhf_exp.stages.preferences import Preferences
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.stages.reward_model import TrainRewardModel
from rlhf_exp.tasks.pairs import PairsFile
from rlhf_exp.tasks.protocol import Conversation, Pair, PromptRow

from ..rewards.checkpoints import chats
from ..rl.toy import WORDS, LowWords, ToyPairs, ToyTask, context, parts_of, rows, saved_model
from .test_pair_classifier import losses, save_body

# A message goes between w11 and w10, the answer after w9; BOS is not used.
TEMPLATE = (
    "{% for m in messages %}w11 {{ m.content }} w10 {% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)
SAMPLER = CachedSampler(gen_len=4, stop_at_eos=True, temperature=3.0)
SMALL = {"batch_size": 40, "log_every": 1, "eval_samples": 8}


def asked(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


def by_hand(text: str) -> str:
    return f"w11 {text} w10 w9"


def give_template(model: Pretrained) -> Pretrained:
    tokenizer = ToyTask().build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model.base_model)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return give_template(saved_model(tmp_path_factory.mktemp("base")))


def row(pair: Pair, form: str) -> dict[str, Any]:
    """A pair of texts as a row of the format."""
    others = {k: v for k, v in pair._asdict().items() if k.endswith(("_reward", "_ended"))}
    texts = {name: getattr(pair, name) for name in ("chosen", "rejected")}
    if form == "by hand":
        return {"prompt": by_hand(pair.prompt), **texts, **others}
    if form == "whole texts":
        return others | {name: by_hand(pair.prompt) + texts[name] for name in texts}
    answers = {name: [{"role": "assistant", "content": texts[name]}] for name in texts}
    if form == "whole conversations":
        return others | {name: [*asked(pair.prompt), *answers[name]] for name in answers}
    return {"prompt": asked(pair.prompt), **answers, **others}


FORMS = ("by hand", "whole texts", "conversations", "whole conversations")


def files_in(path: Path, form: str) -> PairsFile:
    """Pairs of which no two answers begin with the same word."""
    path.mkdir()
    for name, part in zip(("train", "test"), ToyPairs(count=150).pair_split(), strict=True):
        pairs = [pair for pair in part if pair.chosen.split()[0] != pair.rejected.split()[0]]
        lines = [json.dumps(row(pair, form)) + "\n" for pair in pairs]
        (path / f"{name}.jsonl").write_text("".join(lines))
    return PairsFile(path=str(path))


def run(path: Path, stage: Stage[Any], **parts: Any) -> StageResult:
    return stage.run(context(path), parts_of(stage, **{"sampler": SAMPLER, **parts}))


STAGES: dict[str, tuple[Stage[Any], dict[str, Any]]] = {
    "dpo": (DPO(**SMALL), {"reward": None}),
    "dpo on new pairs": (DPO(**SMALL, resample_every=2), {"reward": LowWords()}),
    "reward_model": (
        TrainRewardModel(width=16, batch_size=40, epochs=2, eval_every=4, log_every=1), {},
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", STAGES)
def test_every_format_trains_alike(name: str, tmp_path: Path, model: Pretrained) -> None:
    stage, parts = STAGES[name]
    for form in FORMS:
        task = files_in(tmp_path / f"{form} pairs", form)
        run(tmp_path / form, stage, model=model, task=task, **parts)
    logged = {form: rows(tmp_path / form) for form in FORMS}
    assert logged["by hand"] == logged["whole texts"]
    assert logged["conversations"] == logged["whole conversations"]
    if name == "reward_model":  # which held-out prompts it stops by depends on the prompts' form
        logged = {form: losses(tmp_path / form) for form in FORMS}
        prompt = rows(tmp_path / "conversations", "samples.jsonl")[0]["prompt"]
        assert prompt.startswith("user: w")
    assert logged["by hand"] == logged["conversations"]
    assert len(logged["by hand"]) > 3


@pytest.mark.usefixtures("unchecked")
def test_a_classifier_reads_the_conversation_with_its_answer(tmp_path: Path) -> None:
    bert = save_body(tmp_path / "bert", "bert")
    stage = TrainRewardModel(head="classifier", loss="rank", epochs=1, batch_size=40, log_every=1)
    for name, form in (("a", "conversations"), ("b", "whole conversations")):
        task = files_in(tmp_path / form, form)
        run(tmp_path / name, stage, model=give_template(bert), task=task)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    # What reward=pair_model reads in PPO.
    [sample, *_] = rows(tmp_path / "a", "samples.jsonl")
    answers = chats([asked(sample["prompt"].removeprefix("user: "))], [sample["chosen"]])
    scores = PairModel(name=str(tmp_path / "a")).load(answers.tokens.device)(answers)
    assert scores.tolist() == pytest.approx([sample["chosen_score"]], abs=1e-5)


@pytest.mark.parametrize("head", ["dpo", "token_sum", "classifier"])
def test_a_model_without_a_chat_template_is_named_before_its_weights_are_read(
    head: str, tmp_path: Path, model: Pretrained
) -> None:
    shutil.copytree(model.base_model, tmp_path / "model")
    ToyTask().build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "model/model.safetensors").write_bytes(b"no weights")
    stage = DPO() if head == "dpo" else TrainRewardModel(head=head, loss="rank")
    plain = Pretrained(base_model=str(tmp_path / "model"))
    task = files_in(tmp_path / "pairs", "conversations")
    with pytest.raises(ConfigError, match=r"^task.path: .* conversations, but .* no chat template"):
        run(tmp_path / "run", stage, model=plain, task=task, reward=None)
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Chats(ToyTask):
    """Conversations of one message of two words, and of two such messages."""

    def train_prompts(self) -> tuple[PromptRow, ...]:
        return tuple(
            PromptRow([*asked(f"{a} {b}"), *asked("w0")[: i % 2]], {"n": i})
            for i, a in enumerate(WORDS) for b in WORDS
        )  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_sampled_pairs_of_conversations_are_read_again(
    ending: str, tmp_path: Path, model: Pretrained
) -> None:
    stage = Preferences(num_pairs=60, num_held_out=20, batch_size=32, format=ending)
    run(tmp_path / "run", stage, model=model, task=Chats(), reward=LowWords())
    task = PairsFile(path=str(tmp_path / "run"))
    train, held_out = task.pair_split()
    assert (len(train), len(held_out)) == (60, 20)
    sides = [{repr(pair.prompt) for pair in part} for part in (train, held_out)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] <= {repr(row.prompt) for row in Chats().train_prompts()}
    for pair in train + held_out:
        assert pair.chosen_reward == ToyPairs.reward(pair.chosen)
        assert pair.rejected_reward == ToyPairs.reward(pair.rejected) < pair.chosen_reward
    samples = rows(tmp_path / "run", "samples.jsonl")
    assert samples[0]["prompt"].startswith("user: w")
    if ending == "jsonl":
        [first, *_] = rows(tmp_path / "run/pairs", "train.jsonl")
        assert first["prompt"] == train[0].prompt
        assert first["chosen"] == [{"role": "assistant", "content": train[0].chosen}]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["preferences", "dpo"])
def test_a_run_that_was_stopped_goes_on_with_its_conversations(
    name: str, tmp_path: Path, model: Pretrained
) -> None:
    stage: Stage[Any] = Preferences(num_pairs=40, num_held_out=9, batch_size=16)
    task: Any = Chats()
    if name == "dpo":
        stage = DPO(**{**SMALL, "batch_size": 20}, resample_every=3)
        task = files_in(tmp_path / "pairs", "conversations")
    parts = parts_of(stage, model=model, task=task, reward=LowWords(), sampler=SAMPLER)
    stage.run(context(tmp_path / "whole"), parts)
    for starts in range(20):
        stop = StopRequests()
        stop.limit(1e-9, began=0.0)  # the time is always up; one step is always made
        given = replace(context(tmp_path / "cut", resume=starts > 0), stop=stop)
        try:
            stage.run(given, parts)
            break
        except Interrupted:
            continue
    assert starts > 2
    for file in ("metrics.jsonl", "samples.jsonl", "pairs/train.jsonl", "pairs/test.jsonl"):
        whole, cut = ((tmp_path / run / file) for run in ("whole", "cut"))
        assert cut.exists() == whole.exists()
        if whole.exists():
            assert cut.read_text() == whole.read_text()


def test_texts_and_conversations_do_not_go_into_one_column(
    tmp_path: Path, model: Pretrained
) -> None:
    mixed = ToyTask(prompts=("w0 w1", PromptRow(asked("w2"), {})), prepend_bos=False)
    stage = Preferences(num_pairs=9, num_held_out=9, batch_size=8, format="parquet")
    with pytest.raises(ConfigError, match=r"^stage.format=parquet: a column holds texts or conv"):
        run(tmp_path / "run", stage, model=model, task=mixed, reward=LowWords())
    assert not (tmp_path / "run").exists()
    lines = Preferences(num_pairs=9, num_held_out=9, batch_size=8)
    run(tmp_path / "run", lines, model=model, task=mixed, reward=LowWords())
    parts = [*rows(tmp_path / "run/pairs", "train.jsonl")]
    parts += rows(tmp_path / "run/pairs", "test.jsonl")
    assert {type(row["prompt"]) for row in parts} == {str, list}
