"""A package index and a Hugging Face hub on this machine, for tests that fetch models."""

import hashlib
import json
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from rlhf_exp.models.known import KnownModel

COMMIT = "c" * 40


def make_wheel(index: Path, model: KnownModel, files: Mapping[str, bytes]) -> Path:
    """Writes a wheel with the files to the folder `index`, laid out as PEP 503 says."""
    name = model.package.replace("-", "_")
    info = f"{name}-{model.version}.dist-info"
    path = index / model.package / f"{name}-{model.version}-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, content in files.items():
            wheel.writestr(member, content)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {model.package}\nVersion: {model.version}\n",
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Index(SimpleHTTPRequestHandler):
    """Lists and sends the files of a folder; keeps the paths that were asked for in `asked`."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


class CutOff(Index):
    """Sends half of a wheel and closes the connection."""

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        return None


class Resuming(CutOff):
    """Sends half of a wheel, and the rest to a request for the range from there; keeps the ranges
    that wheels were asked for in `ranges`."""

    ranges: list[str | None]

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            return super().do_GET()
        self.ranges.append(self.headers["Range"])
        content = Path(self.translate_path(self.path)).read_bytes()
        half = len(content) // 2
        if self.headers["Range"] != f"bytes={half}-":
            return super().do_GET()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {half}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - half))
        self.end_headers()
        self.wfile.write(content[half:])
        return None


class Stalling(CutOff):
    """Sends half of a wheel and nothing more until `go_on` is set."""

    halfway: threading.Event
    go_on: threading.Event

    def do_GET(self) -> None:
        super().do_GET()
        if self.path.endswith(".whl"):
            self.wfile.flush()
            self.halfway.set()
            self.go_on.wait(60)


class Hub(BaseHTTPRequestHandler):
    """A hub whose one repository `name` holds the files of the folder `directory`."""

    name: str
    directory: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        files = [p for p in self.directory.rglob("*") if p.is_file()]
        paths = {p.relative_to(self.directory).as_posix(): p for p in files}
        content, headers, status = b"{}", {}, 200
        if re.fullmatch(rf"/api/models/{self.name}/revision/\w+", path):
            siblings = [{"rfilename": name} for name in paths]
            info = {"id": self.name, "sha": COMMIT, "siblings": siblings}
            content = json.dumps(info).encode()
        elif re.fullmatch(rf"/api/models/{self.name}/tree/\w+", path):
            tree = [
                {"type": "file", "path": name, "size": p.stat().st_size, "oid": COMMIT}
                for name, p in paths.items()
            ]
            content = json.dumps(tree).encode()
        elif match := re.fullmatch(rf"/{self.name}/resolve/\w+/(.+)", path):
            if match[1] in paths:
                content = paths[match[1]].read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
            else:
                headers, status = {"X-Error-Code": "EntryNotFound"}, 404
        elif path != "/":
            headers, status = {"X-Error-Code": "RepoNotFound"}, 404
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], **fields: object) -> Iterator[str]:
    """The address of a server with the handler, whose class attributes are `fields`."""
    kind = type(handler.__name__, (handler,), fields)
    make = kind
    if issubclass(kind, SimpleHTTPRequestHandler):
        make = partial(kind, directory=str(fields["directory"]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), make)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
