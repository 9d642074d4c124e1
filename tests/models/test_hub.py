"""Models of the hub, of its cache and of directories, and what is said when one is not there."""

import http.server
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from rlhf_exp.models.classifiers import load_classifier
from rlhf_exp.models.finetune import Lora
from rlhf_exp.models.hub import (
    directory_hash,
    find_file,
    from_pretrained,
    locate_model,
    locate_revision,
)
from rlhf_exp.models.loading import load_language_model, load_policy
from rlhf_exp.models.saving import save_policy
from rlhf_exp.settings import ConfigError
from tests.builders import ragged_tokens, tiny_policy
from tests.models.conftest import UseHub

TOKENS, MASK = ragged_tokens()


@pytest.fixture
def answering(use_hub: UseHub) -> Iterator[list[str]]:
    """A hub whose nobody/gated is gated and that has nothing else; the paths it was asked for, and
    "" for each connection."""
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def setup(self) -> None:
            asked.append("")
            super().setup()

        def do_GET(self) -> None:
            asked.append(self.path)
            gated = "nobody/gated" in self.path
            self.send_response(403 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    use_hub(f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_gated_model_is_to_be_asked_for(answering: list[str]) -> None:
    fix = r"ask for access on http://127\S+/nobody/gated and log in with `hf auth login`"
    with pytest.raises(ConfigError, match=rf"^model\.base_model='nobody/gated' .*: {fix}\.\n"):
        load_policy("nobody/gated")
    with pytest.raises(ConfigError, match=rf"^reward\.name='nobody/gated' .*: {fix}\.\n"):
        load_classifier("nobody/gated", dtype=torch.float32)
    assert any("nobody/gated" in path for path in answering)


def test_a_name_that_the_hub_does_not_have(answering: list[str]) -> None:
    fix = r"check the name on http://127\S+, or name a local directory"
    with pytest.raises(ConfigError, match=rf"^model\.base_model='nobody/typo' .*: {fix}\.\n"):
        load_policy("nobody/typo")
    assert any("nobody/typo" in path for path in answering)


class Breaking(http.server.BaseHTTPRequestHandler):
    """Answers the first request, and closes the connection of every other one."""

    def do_HEAD(self) -> None:
        if self.path == "/":
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_a_hub_that_breaks_connections_is_named(use_hub: UseHub) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Breaking) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        use_hub(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ConfigError, match=r"'nobody/any' cannot be loaded: check the name on"):
            load_policy("nobody/any")
        server.shutdown()
        thread.join()


def test_a_hub_that_accepts_and_never_answers_counts_as_out_of_reach(
    use_hub: UseHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_exp.machine.network.PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        use_hub(f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ConfigError, match=r"^model\.base_model='nobody/any' .*out of reach"):
            load_policy("nobody/any")
        assert time.monotonic() - start < 5


def test_a_directory_is_loaded_without_asking_the_hub(answering: list[str], tmp_path: Path) -> None:
    policy = tiny_policy()
    save_policy(policy, tmp_path)
    assert torch.equal(load_policy(tmp_path)(TOKENS, MASK)[0], policy(TOKENS, MASK)[0])
    assert answering == []


def in_cache(folder: Path, name: str, cache: Path) -> None:
    """Puts a directory where huggingface_hub keeps the model `name`."""
    root = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / ("a" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)


def test_without_a_network_a_model_of_the_cache_is_loaded_at_once(
    use_hub: UseHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub("http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    policy = tiny_policy()
    in_cache(save_policy(policy, tmp_path / "model"), "nobody/cached", tmp_path / "cache")
    start = time.monotonic()
    model, tokenizer = load_language_model("nobody/cached")
    assert torch.equal(
        model(input_ids=TOKENS).logits, policy.language_model(input_ids=TOKENS).logits
    )
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    fix = r"http://127.0.0.1:9 is out of reach and it is not in the local cache"
    with pytest.raises(ConfigError, match=rf"'nobody/other' cannot be loaded: {fix}"):
        load_language_model("nobody/other")
    # huggingface_hub would try again for half a minute, once for each file.
    assert time.monotonic() - start < 5


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    policy = tiny_policy("llama")
    Lora(rank=2).attach(policy, seed=0)
    path = save_policy(policy, tmp_path)
    load_policy(path)
    with pytest.raises(ConfigError, match=r"^model\.base_model=.*/adapter' holds a PEFT adapter"):
        load_policy(path / "adapter")


def test_an_error_without_a_message_is_named_by_its_kind(tmp_path: Path) -> None:
    class Silent:
        @staticmethod
        def from_pretrained(source: str, local_files_only: bool) -> None:
            raise OSError

    with pytest.raises(ConfigError, match=r"field='x' .*: Silent must be able .*\n  OSError$"):
        from_pretrained(Silent, str(tmp_path), "field", "x")


def test_a_revision_is_for_names_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    message = r"^reward\.revision=v2 is for hub names; '.*' is a directory: set it null$"
    with pytest.raises(ConfigError, match=message):
        locate_revision(str(tmp_path), "v2", "reward.name")
    with pytest.raises(ConfigError, match=message):
        load_classifier(str(tmp_path), dtype=torch.float32, revision="v2")
    with pytest.raises(ConfigError, match=r"^model\.revision=v2 is for hub names"):
        load_language_model(str(tmp_path), revision="v2")
    assert locate_revision(str(tmp_path), None, "reward.name") == str(tmp_path)
    assert locate_revision("gpt2", "v2", "reward.name") == "gpt2"


def test_a_file_of_a_directory_or_of_the_cache_is_found(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").touch()
    assert find_file(str(tmp_path), "here", revision=None) == tmp_path / "here"
    assert find_file(str(tmp_path), "not here", revision=None) is None
    cache = tmp_path / "cache"
    snapshot = cache / "models--me--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "head").write_text("weights")
    refs = cache / "models--me--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = find_file("me/model", "head", revision=None)
    assert found is not None
    assert found.read_text() == "weights"
    assert find_file("me/model", "other", revision=None) is None
    assert find_file("me/unknown", "head", revision=None) is None


INDEX = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
MODEL = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "model.safetensors.index.json": json.dumps(INDEX),
    "model-1-of-2.safetensors": "first",
    "model-2-of-2.safetensors": "second",
    "value_head.safetensors": "head",
}


def model_directory(folder: Path, **contents: str) -> Path:
    """A directory with the files of a sharded model; `contents` replaces some of them."""
    folder.mkdir()
    for name, text in (MODEL | contents).items():
        (folder / name).write_text(text)
    return folder


def test_the_hash_of_a_directory_is_of_what_is_loaded_from_it(tmp_path: Path) -> None:
    first = model_directory(tmp_path / "first")
    expected = directory_hash(str(first))
    assert len(expected) == 64
    # Copied elsewhere at another time, with files that no loader opens.
    second = model_directory(tmp_path / "second")
    for name in MODEL:
        os.utime(second / name, (1, 1))
    for name in ("README.md", "notes.txt", "train.log", "optimizer.bin", "trainer_state.json"):
        (second / name).write_text("more")
    (second / "checkpoints").mkdir()
    (second / "checkpoints" / "model.safetensors").write_text("more")
    (second / "old.safetensors").symlink_to(tmp_path / "removed")
    (second / "pytorch_model.bin").write_text("safetensors are preferred")
    assert directory_hash(str(second)) == expected
    assert directory_hash(str(tmp_path / "nowhere")) == directory_hash("artifact:x") == ""
    assert directory_hash(str(first / "config.json")) == ""


@pytest.mark.parametrize("name", [*MODEL, "model.safetensors", "tokenizer_config.json"])
def test_the_hash_of_a_directory_follows_every_file_that_is_loaded(
    tmp_path: Path, name: str
) -> None:
    first = model_directory(tmp_path / "first")
    text = MODEL.get(name, "")
    changed = text.replace("f", "F") if name.startswith("model-1") else f"{text} "
    second = model_directory(tmp_path / "second", **{name: changed})
    stat = (first / "config.json").stat()
    os.utime(second / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert directory_hash(str(first)) != directory_hash(str(second))


def test_code_that_a_model_brings_is_part_of_its_hash(tmp_path: Path) -> None:
    code = '{"auto_map": {"AutoConfig": "own.OwnConfig"}}'
    folders = [
        model_directory(tmp_path / str(i), **{"config.json": config, "own.py": source})
        for i, (config, source) in enumerate([(code, "1"), (code, "2"), ("{}", "1"), ("{}", "2")])
    ]
    hashes = [directory_hash(str(folder)) for folder in folders]
    assert hashes[0] != hashes[1]
    assert hashes[2] == hashes[3]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-2-of-2.safetensors"])
def test_a_pointer_of_git_lfs_is_told_from_a_file(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    folder = model_directory(tmp_path / "model", **{name: pointer})
    message = rf"^reward\.path: {folder / name} is a Git LFS pointer, .*`git lfs pull` in {folder}$"
    with pytest.raises(ConfigError, match=message):
        locate_model(str(folder), field="reward.path")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-2-of-2.safetensors"])
def test_a_link_to_nothing_is_told_from_a_file(tmp_path: Path, name: str) -> None:
    folder = model_directory(tmp_path / "model")
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/12ab")
    message = rf"^model\.base_model='.*': {name} is a link to \.\./blobs/12ab, which does not exist"
    with pytest.raises(ConfigError, match=message):
        locate_model(str(folder))
