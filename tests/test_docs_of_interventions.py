"""docs/interventions.md: its scripts run, and its commands pass every check on what they make; the
README's and the tutorial's look inside a run works."""

import re
import shlex
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from rlhf_exp.models.interventions import Ablate
from rlhf_exp.models.loading import build_policy, load_policy
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.tasks.reviews import Reviews
from tests import test_readme
from tests.test_docs import OPTIONS, compose, with_key

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "interventions.md").read_text("utf-8")
[COMMANDS] = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.M | re.S)
SCRIPTS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of the default model, in place of the user's."""
    policy = build_policy(Scratch(), Reviews().build_tokenizer, device=torch.device("cpu"), seed=0)
    save_policy(policy, tmp_path / "outputs" / "reviews" / "RUN")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_pass_every_check_on_the_file_that_the_script_makes(run: Path) -> None:
    first, second = COMMANDS.splitlines()
    test_readme.test_command_composes_and_passes_every_check(first, run)
    steering, attach = SCRIPTS
    exec(steering, {})
    assert (run / "steering.safetensors").exists()
    test_readme.test_command_composes_and_passes_every_check(second, run)
    tokens = torch.arange(8)[None]
    plain = load_policy("outputs/reviews/RUN")(tokens)[0]
    for command in (first, second):
        words = [word for word in shlex.split(command) if word.startswith("intervention")]
        config = OmegaConf.to_container(compose(*words).intervention)
        policy = load_policy("outputs/reviews/RUN")
        hydra.utils.instantiate(config).attach(policy)
        assert (policy(tokens)[0] - plain).abs().max() > 0.01
    names: dict[str, Any] = {}
    exec(attach, names)
    ablated = load_policy("outputs/reviews/RUN")
    Ablate(heads=[[0, 1], [1, 2]]).attach(ablated)
    assert torch.equal(names["policy"](tokens)[0], ablated(tokens)[0])


def test_the_keys_and_options_that_the_page_names_are_there() -> None:
    keys = set(re.findall(r"`\[?(intervention\.\w+)", PAGE))
    assert len(keys) >= 10
    for key in keys:
        assert any(
            with_key(compose("~experiment", f"intervention={option}"), key)
            for option in OPTIONS["intervention"]
        ), key
    assert set(re.findall(r"`intervention=(\w+)`", PAGE)) == set(OPTIONS["intervention"]) - {"none"}


def test_the_looks_inside_a_run_work(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [readme] = [b for b in test_readme.blocks("python") if "hooked()" in b]
    [tutorial] = test_readme.blocks("python", test_readme.DOCS["tutorial.md"])
    names: dict[str, Any] = {}
    exec(readme, names)
    assert names["values"].shape == (1, 3)
    assert names["cache"]["blocks.1.hook_resid_post"].shape == (1, 3, 64)
    exec(tutorial, {})
    assert "tensor([[" in capsys.readouterr().out
