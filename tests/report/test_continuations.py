"""A run beside its base model."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rlhf_exp.models.loading import Pretrained, load_policy
from rlhf_exp.models.saving import save_policy
from rlhf_exp.report.continuations import continuations, read_run, side_by_side
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.settings import ConfigError
from tests.builders import CONTEXT_LEN, tiny_policy

GREEDY = CachedSampler(gen_len=5, top_k=1)
PROMPTS = ["one two", "three"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found = [tmp_path_factory.mktemp(name) for name in ("base", "tuned")]
    for seed, folder in enumerate(found):
        save_policy(tiny_policy(seed=seed), folder)
    return [str(folder) for folder in found]


def test_completions_are_the_models_own(folders: list[str]) -> None:
    given = [
        continuations(
            Pretrained(base_model=f), PROMPTS, prepend_bos=True, chat=False, sampler=GREEDY, seed=0
        )
        for f in folders
    ]
    assert given[0] != given[1]
    for folder, texts in zip(folders, given, strict=True):
        policy = load_policy(folder)
        for prompt, text in zip(PROMPTS, texts, strict=True):
            ids = [1, *policy.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
            for _ in range(5):
                ids.append(int(policy(torch.tensor([ids]))[0][0, -1].argmax()))
            whole = policy.tokenizer.decode(ids, skip_special_tokens=True)
            assert prompt + text == whole


def test_the_seed_and_bos_count(folders: list[str]) -> None:
    sampler = CachedSampler(gen_len=8)

    def sampled(seed: int, *, bos: bool) -> tuple[str, ...]:
        return continuations(
            Pretrained(base_model=folders[0]),
            PROMPTS,
            prepend_bos=bos,
            chat=False,
            sampler=sampler,
            seed=seed,
        )

    assert sampled(0, bos=True) == sampled(0, bos=True) != sampled(1, bos=True)
    assert sampled(0, bos=True) != sampled(0, bos=False)


def test_chat_needs_a_template_and_a_completion_needs_room(folders: list[str]) -> None:
    def ask(*, chat: bool, gen_len: int) -> None:
        sampler = CachedSampler(gen_len=gen_len)
        model = Pretrained(base_model=folders[0])
        continuations(model, ["one"], prepend_bos=True, chat=chat, sampler=sampler, seed=0)

    with pytest.raises(ConfigError, match="no chat template"):
        ask(chat=True, gen_len=2)
    ask(chat=False, gen_len=CONTEXT_LEN - 2)
    with pytest.raises(ConfigError, match=rf"room for {CONTEXT_LEN - 2} tokens: lower --gen-len"):
        ask(chat=False, gen_len=CONTEXT_LEN - 1)


def test_a_run_under_an_intervention_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    intervention: dict[str, object] = {"_target_": "x.NoIntervention"}
    for is_told in (False, True):
        text = json.dumps({"intervention": intervention})
        (tmp_path / "resolved_config.json").write_text(text)
        read_run(tmp_path)
        assert ("its saved model does not have it" in caplog.text) == is_told
        intervention["mlps"] = [1]


def test_a_run_says_what_it_began_as(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a finished run"):
        read_run(tmp_path)
    file = tmp_path / "resolved_config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match="not the folder of a finished run"):
        read_run(tmp_path)
    model = {"base_model": "gpt2", "revision": "old", "trust_remote_code": True}
    file.write_text(
        json.dumps({"model": {"_target_": "x.Pretrained", **model}, "task": {"prepend_bos": True}})
    )
    run = read_run(tmp_path, trust_remote_code=True)
    assert (run.folder, run.base, run.prepend_bos) == (tmp_path, Pretrained(**model), True)
    assert run.tuned == Pretrained(base_model=str(tmp_path), trust_remote_code=True)
    careful = read_run(tmp_path)
    assert careful.base == Pretrained(**{**model, "trust_remote_code": False})
    assert careful.tuned == Pretrained(base_model=str(tmp_path))
    file.write_text(json.dumps({"model": {"num_layers": 2}, "task": {"prepend_bos": None}}))
    run = read_run(str(tmp_path))
    assert (run.base, run.prepend_bos) == (None, None)
    assert run.tuned == Pretrained(base_model=str(tmp_path))


def test_the_table_shows_markup_as_text() -> None:
    def shown(base: list[str] | None) -> str:
        out = io.StringIO()
        Console(file=out, width=60).print(side_by_side(["p1", "p2"], base, ["[b]x[/b]", "y"]))
        return out.getvalue()

    assert "[b]x[/b]" in shown(["old", "older"])
    assert "older" in shown(["old", "older"])
    assert "base" in shown(["old", "older"])
    assert "base" not in shown(None)
