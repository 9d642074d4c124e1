"""Pushing to a hub: a local server that speaks its protocol, and what is refused beforehand."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf_exp.machine.network import reachable, responds
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.tracking.push import HubSettings


class Hub(ThreadingHTTPServer):
    """Takes a repository and a commit of small files, and remembers them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, str, bytes]] = []
        self.refuses = ""

    def committed(self) -> dict[str, bytes]:
        [body] = [body for path, _, body in self.asked if "/commit/" in path]
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        return {file["path"]: base64.b64decode(file["content"]) for file in files}


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, self.headers.get("Authorization", ""), body))
        if self.server.refuses and self.server.refuses in self.path:
            self.send_response(403)
            self.send_header("X-Error-Message", "you may not")
            self.end_headers()
            return
        answer: dict[str, object] = {}
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.endpoint}/me/model"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **regular} for file in files]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.endpoint}/me/model/commit/a", "commitOid": "a"}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    reachable.cache_clear()
    responds.cache_clear()
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()
    reachable.cache_clear()
    responds.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "adapter" / "weights").write_bytes(b"\x00\x01")
    return tmp_path


def test_the_folder_is_committed_to_a_repository_made_for_it(hub: Hub, folder: Path) -> None:
    settings = HubSettings(push=True, repo="me/model")
    assert settings.problems() == []
    settings.upload(folder)
    [created] = [json.loads(b) for path, _, b in hub.asked if path == "/api/repos/create"]
    assert (created["organization"], created["name"]) == ("me", "model")
    assert created["visibility"] == "private"
    assert hub.committed() == {"README.md": b"card", "adapter/weights": b"\x00\x01"}
    assert {key for path, key, _ in hub.asked if "me/model" in path} == {"Bearer hf_secret"}


def test_a_public_repository_is_asked_for(hub: Hub, folder: Path) -> None:
    HubSettings(push=True, repo="me/model", private=False).upload(folder)
    [created] = [json.loads(b) for path, _, b in hub.asked if path == "/api/repos/create"]
    assert created["visibility"] == "public"


def test_nothing_is_asked_of_the_hub_without_push(hub: Hub, folder: Path) -> None:
    settings = HubSettings(repo="me/model")
    assert settings.problems() == []
    settings.upload(folder)
    assert hub.asked == []


@pytest.mark.parametrize("refuses", ["/api/", "/commit/"])
def test_a_hub_that_refuses_is_told_with_the_command_by_hand(
    hub: Hub, folder: Path, refuses: str
) -> None:
    hub.refuses = refuses
    with pytest.raises(TrainingError, match=rf"403.*hf upload me/model {folder}") as caught:
        HubSettings(push=True, repo="me/model").upload(folder)
    assert "hf_secret" not in str(caught.value)


def test_a_push_without_a_token_is_refused_beforehand(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    [problem] = HubSettings(push=True, repo="me/model").problems()
    assert problem.startswith("hub.push=true: no Hugging Face token; log in with `hf auth login`")
    assert HubSettings(repo="me/model").problems() == []


def test_a_push_offline_is_refused_beforehand(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    [problem] = HubSettings(push=True, repo="me/model").problems()
    assert "out of reach (or HF_HUB_OFFLINE is set)" in problem
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert HubSettings(push=True, repo="me/model").problems() == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    [problem] = HubSettings(push=True, repo="me/model").problems()
    assert "http://127.0.0.1:9 is out of reach" in problem


def test_a_push_needs_a_repository() -> None:
    with pytest.raises(ValidationError, match=r"hub\.repo=OWNER/NAME"):
        HubSettings(push=True)
    for name in ("a/b/c", "", "a b"):
        with pytest.raises(ValidationError, match="repo"):
            HubSettings(push=True, repo=name)


def test_a_token_that_the_hub_does_not_take_is_refused_beforehand(hub: Hub) -> None:
    hub.refuses = "/api/whoami"
    [problem] = HubSettings(push=True, repo="me/model").problems()
    assert re.search(rf"hub.push=true: {hub.endpoint} does not take the token .*403", problem)
    assert "hf_secret" not in problem


def test_a_hub_that_goes_away_is_told_with_the_command_by_hand(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TrainingError, match=rf"the push failed.*hf upload me/model {folder}"):
        HubSettings(push=True, repo="me/model").upload(folder)
