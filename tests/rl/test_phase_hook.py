"""The user's function after phases: what it sees, what is logged, and that training never feels
it."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_exp.models.interventions import Intervention, NoIntervention
from rlhf_exp.models.loading import load_policy
from rlhf_exp.rl.phase_hook import find_hook, read_numbers, unchanged
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.ppo import PPO

from ..builders import tiny_policy
from ..edited import settings as intervention_of
from ..stages.test_resume import Failing
from ..test_readme import look
from .toy import RAGGED, collect, context, parts, ppo_with, rows, saved_model, start

pytestmark = pytest.mark.usefixtures("unchecked")

SMALL = ppo_with(
    total_phases=5, batch_size=8, num_minibatches=2, eval_every=5, eval_samples=4,
    checkpoint_every=2, histograms_every=None, dtype="fp32",
)  # fmt: skip
# Draws, switches dropout on, thaws and clears, and leaves gradients: all that would be felt.
MEDDLING = """
import random
import numpy, torch

def look(policy, phase, rollout):
    tokens = torch.tensor([[1, 4, 5, 6]])
    cache = policy.hooked().run_with_cache(tokens)[1]
    norm = cache["blocks.0.hook_resid_post"].norm(dim=-1).mean()
    numbers = {"phase": phase, "scores": rollout.scores.mean(), "norm": norm}
    numbers["drawn"] = torch.rand(()) + random.random() + numpy.random.rand()
    policy.language_model.train()
    policy.zero_grad()
    policy.requires_grad_(True)
    with torch.enable_grad():
        policy(tokens)[0].logsumexp(-1).sum().backward()
    policy.requires_grad_(False)
    return numbers
"""


@pytest.fixture(autouse=True)
def forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test makes importable is forgotten."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def hook(path: Path, source: str) -> str:
    path.with_suffix(".py").write_text(source)
    return f"{path.with_suffix('.py')}:look"


def run(path: Path, ppo: PPO, *, resume: bool = False, **replaced: Any) -> list[dict[str, Any]]:
    """The rows of a run."""
    torch.manual_seed(3)
    ppo.run(context(path, resume=resume), parts(**{"task": RAGGED, **replaced}))
    return rows(path)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(("time/", "own/"))}


def weights(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((path / "model").glob("*.safetensors"))]


@pytest.mark.parametrize("value_model", ["shared", "separate"])
def test_a_run_is_bit_for_bit_the_one_without_it(value_model: Any, tmp_path: Path) -> None:
    plain = ppo_with(SMALL, value_model=value_model)
    hooked = ppo_with(plain, on_phase=hook(tmp_path / "mine", MEDDLING), on_phase_every=2)
    model = saved_model(tmp_path / "base", architecture="llama", dropout=0.3)
    expected, found = (run(tmp_path / n, p, model=model) for n, p in (("a", plain), ("b", hooked)))
    assert [*map(without_times, expected)] == [*map(without_times, found)]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    own = {row["phase"]: row for row in found if "own/norm" in row}
    assert list(own) == [2, 4, 5]
    for phase, row in own.items():
        assert row["own/phase"] == phase
        assert row["own/scores"] == pytest.approx(row["objective/scores"])
        assert row["own/norm"] > 0
    assert len({row["own/norm"] for row in own.values()}) == 3


def test_everything_that_a_call_could_leave_is_as_before() -> None:
    policy = tiny_policy("llama", dropout=0.1)
    policy.value_head[0].weight.requires_grad_(False)
    policy.value_head[2].weight.grad = torch.ones_like(policy.value_head[2].weight)
    before = {name: (p.requires_grad, p.grad) for name, p in policy.named_parameters()}
    modes = [module.training for module in policy.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with unchanged(policy):
        assert not torch.is_grad_enabled()
        policy.train()
        policy.language_model.train()
        torch.rand(7)
        policy.zero_grad()
        policy.requires_grad_(True)
        with torch.enable_grad():
            policy(torch.tensor([[1, 4, 5]]))[1].sum().backward()
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in policy.modules()] == modes
    for name, parameter in policy.named_parameters():
        requires_grad, gradient = before[name]
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is gradient


def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(tmp_path: Path) -> None:
    ppo = ppo_with(SMALL, on_phase=hook(tmp_path / "mine", MEDDLING), on_phase_every=1)
    whole = run(tmp_path / "whole", ppo, reward=Failing())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", ppo, reward=Failing(at=5))
    resumed = run(tmp_path / "cut", ppo, reward=Failing(), resume=True)
    for one, other in zip(whole, resumed, strict=True):
        one, other = (
            {k: v for k, v in r.items() if not k.startswith("time/")} for r in (one, other)
        )
        assert one == other
    assert sum("own/drawn" in row for row in resumed) == 5
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


LOGITS = """
import torch

def look(policy, phase, **rest):
    return {"logit": policy(torch.tensor([[1, 4, 5, 6]]))[0][0, -1, 4]}
"""


def test_it_sees_the_policy_under_the_intervention(tmp_path: Path) -> None:
    ppo = ppo_with(SMALL, total_phases=1, on_phase=hook(tmp_path / "mine", LOGITS))
    model = saved_model(tmp_path / "base", architecture="llama")
    seen = []
    intervention: Intervention
    for intervention in (NoIntervention(), intervention_of("add", tmp_path)):
        path = tmp_path / type(intervention).__name__
        found = run(path, ppo, model=model, intervention=intervention)
        [row] = [row for row in found if "own/logit" in row]
        policy = load_policy(path)
        intervention.attach(policy)
        expected = policy(torch.tensor([[1, 4, 5, 6]]))[0][0, -1, 4].item()
        assert row["own/logit"] == pytest.approx(expected, abs=1e-4)
        seen.append(expected - load_policy(path)(torch.tensor([[1, 4, 5, 6]]))[0][0, -1, 4].item())
    assert abs(seen[1]) > 0.01


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('no such head')", r"raised KeyError: 'no such head' at \S*mine\.py:3"),
        ("import sys; sys.exit(2)", r"raised SystemExit: 2 at \S*mine\.py:3"),
        ("return [1.0]", "returned list, not a dict of numbers by name"),
        ("return {'a b': 1}", "returned the name 'a b': names are of letters"),
        ("return {3: 1}", "returned the name 3: names"),
        ("return {'a': '1'}", "returned str as a, not a number"),
        ("return {'a': 1j}", "returned complex as a, not a number"),
        ("return {'a': rollout.scores}", "returned Tensor as a, not a number"),
    ],
)
def test_its_failures_are_said_once_and_end_nothing(
    body: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = hook(
        tmp_path / "mine", f"def look(policy, phase, rollout):\n    policy.train()\n    {body}\n"
    )
    ppo = ppo_with(SMALL, on_phase=name, on_phase_every=1, eval_samples=2)
    found = run(tmp_path / "run", ppo)
    assert not any(key.startswith("own/") for row in found for key in row)
    assert found[-1]["phase"] == 5
    [warning] = [message for message in caplog.messages if "on_phase" in message]
    assert warning.startswith(f"phase 1: stage.on_phase={name} ")
    assert re.search(said, warning)


def test_another_failure_is_said_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = "def look(policy, phase, rollout):\n    raise ValueError(phase > 2)\n"
    run(
        tmp_path / "run",
        ppo_with(SMALL, on_phase=hook(tmp_path / "mine", source), on_phase_every=1),
    )
    said = [message for message in caplog.messages if "on_phase" in message]
    assert [message.partition(":")[0] for message in said] == ["phase 1", "phase 3"]


def test_numbers_of_every_kind_are_read() -> None:
    numbers = read_numbers(
        {"a": 1, "b/c.d-e": torch.tensor([2.5]), "f": np.float32(0.5), "g": True}
    )
    assert numbers == {"own/a": 1.0, "own/b/c.d-e": 2.5, "own/f": 0.5, "own/g": 1.0}
    assert {type(number) for number in numbers.values()} == {float}
    assert read_numbers(None) == {}


def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    source = "def look(policy, phase, rollout):\n    return {'a': float('nan'), 'b': 1}\n"
    ppo = ppo_with(SMALL, total_phases=1, on_phase=hook(tmp_path / "mine", source))
    [row] = [row for row in run(tmp_path / "run", ppo) if "own/b" in row]
    assert row["own/a"] is None
    assert row["own/b"] == 1


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("{}/mine.py:glance", "def look(policy, phase, rollout): ...", "there is no glance in"),
        ("{}/other.py:look", "", r"cannot read \S*other\.py: No such file"),
        ("{}/mine.py", "", r"give module:callable or path/to/file\.py:callable"),
        ("{}/mine.py:look", "1 / 0", r"running \S*mine\.py raised ZeroDivisionError"),
        ("{}/mine.py:look", "def look(policy, phase): ...", r"takes \(policy, phase\), but must"),
        ("{}/mine.py:look", "def look(policy, phase, rollout, top): ...", "must take the keywords"),
        ("no_such_module:look", "", "there is no module no_such_module"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused_before_a_model_is_loaded(
    name: str, source: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(source)
    name = name.format(tmp_path)
    with pytest.raises(ConfigError, match=rf"^stage\.on_phase={name}: .*{said}"):
        ppo_with(SMALL, on_phase=name).check(parts())


def test_the_example_of_the_page_measures_what_it_says(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "base", architecture="llama")
    setup, state = start(SMALL, tmp_path, task=RAGGED, model=model)
    rollout = collect(SMALL, setup, state).rollout
    norms = find_hook(f"{look(tmp_path / 'look.py')}:norms")
    found = read_numbers(norms(policy=setup.policy, phase=1, rollout=rollout))
    tokens, mask = rollout.completions.sequences
    assert not mask.all()
    seen: list[torch.Tensor] = []
    block = setup.policy.language_model.model.layers[1]
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    for ids, real in zip(tokens, mask, strict=True):
        setup.policy(ids[real][None])
    expected = torch.cat([x[0].norm(dim=-1) for x in seen]).mean().item()
    assert found == {"own/resid_norm": pytest.approx(expected, rel=1e-5)}


def test_an_importable_function_is_found() -> None:
    assert find_hook(f"{__name__}:importable") is importable


def importable(policy: Any, **rest: Any) -> dict[str, float]:
    return {"loaded": 1.0}
