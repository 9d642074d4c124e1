"""Data is never code: no pickle is executed on any way into the package, and its sources call
nothing that would do so."""

import ast
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_exp.models.classifiers import load_classifier
from rlhf_exp.models.loading import (
    load_language_model,
    load_policy,
    load_tokenizer,
)
from rlhf_exp.models.lora import add_adapter, save_adapter
from rlhf_exp.models.reward_model import load_reward_model
from rlhf_exp.models.saving import save_policy
from rlhf_exp.rewards.pair_model import PairModel
from rlhf_exp.runs.checkpoint import (
    MANIFEST,
    TENSORS,
    DamagedError,
    read_checkpoint,
    write_checkpoint,
)
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.tables import Source, read_table
from tests.builders import tiny_policy
from tests.rewards.checkpoints import save_classifier

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(ROOT / "rlhf_exp").rglob("*.py"), *(ROOT / "scripts").glob("*.py"),
    *(ROOT / "hydra_plugins").glob("*.py"), ROOT / "train.py",
]  # fmt: skip
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Functions that may execute what they read, unless they belong to something that does not.
LOADS = {"load", "loads", "read_pickle", "Unpickler", "unsafe_load", "full_load"}
READERS = PICKLES | {"torch", "np", "numpy", "yaml", "pd", "pandas"}
CPU = torch.device("cpu")


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that is there if a pickle was executed."""
    return tmp_path / "ran"


def poison(directory: Path, ran: Path, *, old: str, new: str) -> None:
    """Replaces weights by a pickle of as many weights that does more."""
    (directory / old).unlink()
    torch.save({"weight": torch.zeros(2), "more": Touch(ran)}, directory / new)


def test_the_pickles_of_these_tests_do_run(ran: Path, tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    poison(tmp_path, ran, old="model", new="file")
    torch.load(tmp_path / "file", weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize(
    "load",
    [load_policy, lambda path: load_language_model(str(path)), load_reward_model],
    ids=["policy", "language model", "reward model"],
)
def test_a_language_model_whose_weights_are_a_pickle_is_refused(
    load: Callable, ran: Path, tmp_path: Path
) -> None:
    path = save_policy(tiny_policy(), tmp_path / "model")
    shape = {"kind": "token_sum", "width": 4, "read_layers": 1, "prepend_bos": True}
    (path / "reward_head.json").write_text(json.dumps(shape))
    poison(path, ran, old="model.safetensors", new="pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"its weights are a pickle that would run code; if you trust it, save it"
    ):
        load(path)
    assert not ran.exists()


def test_weights_in_the_old_format_are_loaded(tmp_path: Path) -> None:
    policy = tiny_policy()
    path = save_policy(policy, tmp_path / "model")
    (path / "model.safetensors").unlink()
    weights = policy.language_model.state_dict()
    torch.save(
        {name: tensor.clone() for name, tensor in weights.items()}, path / "pytorch_model.bin"
    )
    loaded, _ = load_language_model(str(path))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_a_classifier_whose_weights_are_a_pickle_is_refused(ran: Path, tmp_path: Path) -> None:
    path = Path(save_classifier(tmp_path, "gpt2"))
    poison(path, ran, old="model.safetensors", new="pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"reward\.name=.* a pickle that would run code"):
        load_classifier(str(path), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"reward\.name=.* a pickle that would run code"):
        PairModel(name=str(path)).load(CPU)
    assert not ran.exists()


def test_an_adapter_that_is_a_pickle_is_refused(ran: Path, tmp_path: Path) -> None:
    policy = tiny_policy("llama")
    save_policy(policy, tmp_path / "model")
    add_adapter(policy.language_model, rank=2, alpha=4, target_modules="all-linear", seed=0)
    save_adapter(policy.language_model, tmp_path / "model")
    poison(tmp_path / "model", ran, old="adapter_model.safetensors", new="adapter_model.bin")
    with pytest.raises(ConfigError):
        load_policy(tmp_path / "model")
    assert not ran.exists()


def test_a_value_head_that_is_a_pickle_is_refused(ran: Path, tmp_path: Path) -> None:
    path = save_policy(tiny_policy(), tmp_path / "model")
    poison(path, ran, old="value_head.safetensors", new="value_head.safetensors")
    with pytest.raises(ConfigError, match="is not a value head of this model"):
        load_policy(path)
    assert not ran.exists()


def test_a_checkpoint_that_is_a_pickle_is_refused(ran: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, {"weight": torch.zeros(2)}, {"phase": 1})
    poison(path, ran, old=TENSORS, new=TENSORS)
    content = (path / TENSORS).read_bytes()
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][TENSORS] = {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match=r"[Hh]eader"):
        read_checkpoint(path)
    assert not ran.exists()


def test_a_tokenizer_that_is_a_pickle_is_refused(ran: Path, tmp_path: Path) -> None:
    path = save_policy(tiny_policy(), tmp_path / "model")
    (path / "tokenizer.json").write_bytes(pickle.dumps(Touch(ran)))
    with pytest.raises(ConfigError):
        load_tokenizer(str(path))
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["rows.pkl", "rows.pickle", "rows.arrow", "rows.parquet", "rows.py"]
)
def test_a_data_set_that_is_a_pickle_is_refused(name: str, ran: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()".encode()
    content = code if name.endswith(".py") else pickle.dumps(Touch(ran))
    (folder / name).write_bytes(content)
    shutil.copy(
        folder / name, folder / f"data{Path(name).suffix}"
    )  # a script has its folder's name
    for path in (folder, folder / name):
        with pytest.raises(ConfigError):
            read_table(Source(path=str(path)))
    assert not ran.exists()


def dangerous(tree: ast.AST) -> list[str]:
    """The calls in a source by which data could become code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found += [alias.name for alias in node.names if alias.name != "UnpicklingError"]
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("eval", "exec", "__import__"):
            found.append(function.id)
        if isinstance(function, ast.Attribute) and function.attr in LOADS:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            owner = ast.unparse(function.value)
            if owner in READERS and given.get("weights_only") != "True":
                found.append(f"{owner}.{function.attr}")
        for keyword in node.keywords:
            if keyword.arg in ("weights_only", "trust_remote_code", "allow_pickle"):
                bad = {"weights_only": "False"}.get(keyword.arg, "True")
                found += [keyword.arg] if ast.unparse(keyword.value) == bad else []
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from joblib import load", ["load"]),
        ("from pickle import UnpicklingError", []),
        ("torch.load(path)", ["torch.load"]),
        ("torch.load(path, weights_only=False)", ["torch.load", "weights_only"]),
        ("torch.load(path, weights_only=True); json.loads(text)", []),
        ("eval(text); exec(code)", ["eval", "exec"]),
        ("model.eval(); reward.load(device); OmegaConf.load(path)", []),
        ("np.load(x, allow_pickle=True)", ["np.load", "allow_pickle"]),
        ("yaml.load(text); yaml.safe_load(text)", ["yaml.load"]),
        ("f(trust_remote_code=True, weights_only=False)", ["trust_remote_code", "weights_only"]),
    ],
)
def test_what_is_dangerous_is_recognised(source: str, found: list[str]) -> None:
    assert dangerous(ast.parse(source)) == found


def test_the_sources_make_no_code_of_data() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {call}"
        for path in SOURCES
        for call in dangerous(ast.parse(path.read_text(encoding="utf-8")))
    }
    # The user's own file with a reward in it, which is named to be run.
    assert found == {"rlhf_exp/rewards/function.py: exec"}
