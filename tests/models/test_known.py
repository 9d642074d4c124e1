"""Short names of models: where each is loaded from, in a run too, and what is said if it is
nowhere."""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from rlhf_exp.app.run import CONF
from rlhf_exp.models.classifiers import load_classifier
from rlhf_exp.models.hub import locate_model
from rlhf_exp.models.known import KNOWN, hub_name
from rlhf_exp.models.loading import Pretrained, load_policy
from rlhf_exp.models.saving import save_policy
from rlhf_exp.report.continuations import read_run
from rlhf_exp.settings import ConfigError
from tests.app.test_run import OWN_MODEL, TINY, assert_refused, train
from tests.builders import ragged_tokens, tiny_policy
from tests.model_servers import Hub, serving
from tests.models.conftest import UseHub
from tests.models.test_hub import in_cache

TOKENS, MASK = ragged_tokens()
WORDS = [*OWN_MODEL, *(word for word in TINY if word.startswith(("stage.", "schedule.")))]
WORDS += ["logger=local", "task=prefix", "task.prefix=a", "reward=length"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, an empty cache of the hub, and neither hub nor package index."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def fetched(name: str, seed: int = 0) -> Path:
    """The folder of a fetched model, with a small one in it."""
    return save_policy(tiny_policy(seed=seed), Path("outputs/models") / name)


def test_each_name_is_an_option_of_the_group_model() -> None:
    for name, model in KNOWN.items():
        assert model.name == name
        assert re.fullmatch("[0-9a-f]{64}", model.sha256)
        option = Path(CONF, "model", f"{name}.yaml").read_text()
        assert f"\nbase_model: {name} " in option
        assert option.startswith(f"# {model.summary}")
        assert hub_name(name) == model.hub_name
    assert hub_name("gpt2") == "gpt2"


def test_a_fetched_model_is_loaded_before_any_folder_of_that_name(tmp_path: Path) -> None:
    folder = fetched("smollm2").absolute()
    (tmp_path / "smollm2").mkdir()
    assert locate_model("smollm2") == str(folder)
    policy = load_policy("smollm2")
    assert torch.equal(policy(TOKENS, MASK)[0], load_policy(folder)(TOKENS, MASK)[0])
    settings = Pretrained(base_model="smollm2")
    assert settings.fingerprint() == Pretrained(base_model=str(folder)).fingerprint() != ""
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"^reward\.name='smollm2' is a directory without a mod"):
        locate_model("smollm2", field="reward.name")


def test_without_it_the_hub_or_its_cache_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_hub: UseHub
) -> None:
    in_cache(fetched("other"), KNOWN["smollm2"].hub_name, tmp_path / "cache")
    assert locate_model("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert Pretrained(base_model="smollm2").fingerprint() == ""
    with pytest.raises(ConfigError):
        locate_model("minilm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with serving(Hub, name="any", directory=tmp_path, asked=[]) as url:
        use_hub(url)
        assert locate_model("minilm") == "sentence-transformers/all-MiniLM-L6-v2"


def test_a_model_that_is_nowhere_is_to_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_exp.machine.locations.REPOSITORY", Path("/clone"))
    monkeypatch.setattr("rlhf_exp.machine.locations.SCRIPTS", Path("scripts"))
    message = (
        "reward.name='minilm' is not in outputs/models/minilm, and https://huggingface.co is out of"
        " reach: fetch it with `python scripts/fetch.py minilm`"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_classifier("minilm", dtype=torch.float32)


def test_only_models_with_a_short_name_can_be_fetched() -> None:
    with pytest.raises(ValueError, match=r"fetch=true is for the models smollm2, minilm: set it f"):
        Pretrained(base_model="gpt2", fetch=True)


def test_a_model_that_is_to_be_fetched_is_fetched_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_hub: UseHub
) -> None:
    on_hub = save_policy(tiny_policy(), tmp_path / "on hub")
    settings = Pretrained(base_model="smollm2", fetch=True)
    asked: list[str] = []
    with serving(Hub, name=KNOWN["smollm2"].hub_name, directory=on_hub, asked=asked) as url:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        use_hub(url)
        assert settings.locate() is None
        assert settings.skeleton() is None
        assert asked == []
        assert not Path("outputs").exists()
        assert settings.fingerprint() == Pretrained(base_model=str(on_hub)).fingerprint()
        assert asked != []
    assert settings.locate() == str(Path("outputs/models/smollm2").absolute())
    assert settings.skeleton() is not None
    assert (
        settings.value_head_path()
        == Path("outputs/models/smollm2/value_head.safetensors").absolute()
    )
    model, _ = settings.language_model(None, seed=0)
    assert torch.equal(model(TOKENS).logits, load_policy(on_hub).language_model(TOKENS).logits)


def test_a_run_loads_a_fetched_model_by_its_name(tmp_path: Path) -> None:
    refused = train(tmp_path, *WORDS, "model=smollm2")
    assert_refused(refused, r"model\.base_model='smollm2' is not in outputs/models/smollm2, and ")
    planned = train(tmp_path, *WORDS, "model=smollm2", "model.fetch=true", "dry_run=true")
    assert (planned.code, planned.raised) == (0, None), planned.out + planned.err
    assert not Path("outputs/models").exists()
    fetched("smollm2")
    outcome = train(tmp_path, *WORDS, "model=smollm2", "model.fetch=true")
    assert (outcome.code, outcome.raised) == (0, None), outcome.out + outcome.err
    [run] = [file.parent for file in tmp_path.glob("outputs/run/*/result.json")]
    assert (
        json.loads((run / "resolved_config.json").read_text())["model"]["base_model"] == "smollm2"
    )
    assert (
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in (run / "model/README.md").read_text()
    )
    assert read_run(run).base == Pretrained(base_model="smollm2"), "a folder must not set fetch"
