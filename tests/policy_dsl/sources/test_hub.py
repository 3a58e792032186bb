"""Models of the hub, asked for over HTTP from servers on this machine that answer as it does.

The client runs in a process of its own: huggingface_hub reads the environment when imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from policy_dsl.inventory import source_digest
from tests.models import TINY, tiny

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny"
SHARD = "model-00002-of-00004.safetensors"
SUBFOLDER_FILES = ("additional_chat_templates/rag.jinja", "additional_chat_templates/a.safetensors")

CLIENT = """
import json, sys
from policy_dsl.sources import reference
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import source_digest
try:
    from policy_dsl.sources import hub
    hub.FIRST_WAIT_SECONDS, hub.RETRIES = 0.01, 2
    hub.PATIENCE_SECONDS = 0.5
except ValueError:
    pass
try:
    found = reference.open_source(sys.argv[1])
except PolicyError as error:
    said = {"errors": [[d.code, d.message, d.suggestion] for d in error.diagnostics]}
else:
    said = {"digest": source_digest(found), "id": found.id, "notes": found.notes,
            "root": str(found.root) if found.root else None,
            "tensors": len(found.tensors), "side_files": found.side_files,
            "unread": found.unread}
print(json.dumps(said))
"""


@dataclass
class Hub:
    """How the servers answer, and what they were asked."""

    folder: Path = TINY
    ranges: bool = True
    token: str | None = None
    refusal: tuple[int, str] | None = None
    failures: int = 0
    busy: dict[str, str] = field(default_factory=dict)
    drips: bool = False
    listing: dict[str, Any] = field(default_factory=dict)
    cut: int = 0
    content_range: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0
    commit: str = COMMIT
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    served: int = 0
    endpoint: str = ""
    cdn: str = ""
    cache: Path = Path()

    def ask(self, reference: str, **env: str) -> dict[str, Any]:
        """What a client in a fresh process says about a reference."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        clean |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.cache), "NO_PROXY": "*"}
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, reference],
            env=clean | env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def codes(self, reference: str, **env: str) -> list[str]:
        """The codes of the errors that a reference gives."""
        return [code for code, _, _ in self.ask(reference, **env)["errors"]]


class Answers(BaseHTTPRequestHandler):
    """The hub: a listing of files, and a redirect to the other server for each file."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        hub = self.hub
        # Newer versions of huggingface_hub ask questions of their own, too.
        if NAME in self.path or self.role() == "cdn":
            hub.asked.append((self.role(), self.path, self.headers.get("Authorization")))
            time.sleep(hub.delay)
        if hub.failures > 0:
            hub.failures -= 1
            self.answer(503, b"busy", hub.busy)
        else:
            self.serve()

    def role(self) -> str:
        return "hub"

    def serve(self) -> None:
        hub = self.hub
        listed = re.fullmatch(rf"/api/models/{NAME}(/revision/(\w+))?\?blobs=true", self.path)
        file = re.fullmatch(rf"/{NAME}/resolve/{COMMIT}/(.+)", self.path)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif listed and listed[2] in (None, "main", "v1", COMMIT):
            self.answer(200, json.dumps(self.listing() | hub.listing).encode())
        elif listed:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif file and hub.refusal:
            self.answer(hub.refusal[0], b"", {"X-Error-Code": hub.refusal[1]})
        elif file:
            self.answer(302, b"", {"Location": f"{hub.cdn}/{file[1]}?signature=x"})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def listing(self) -> dict[str, Any]:
        files = [
            {"rfilename": path.name, "size": path.stat().st_size}
            for path in self.hub.folder.iterdir()
        ]
        beside = ("original/consolidated.pth", "original/a/b", ".cache/c", *SUBFOLDER_FILES)
        files += [{"rfilename": name, "size": 9} for name in beside]
        return {"id": NAME, "sha": self.hub.commit, "siblings": files}

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.write(body)

    def write(self, body: bytes) -> None:
        try:
            if self.hub.drips:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
                return
            for start in range(0, len(body), 1 << 14):
                self.wfile.write(body[start : start + (1 << 14)])
                self.hub.served += len(body[start : start + (1 << 14)])
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class FileAnswers(Answers):
    """The server that files are redirected to."""

    def role(self) -> str:
        return "cdn"

    def serve(self) -> None:
        hub = self.hub
        whole = (hub.folder / self.path[1:].partition("?")[0]).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (hub.ranges and asked):
            self.answer(200, whole, hub.headers)
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(whole))
        said = hub.content_range or f"bytes {start}-{stop - 1}/{len(whole)}"
        body = whole[start : stop - hub.cut]
        if hub.cut:
            self.close_connection = True
        self.send_response(206)
        self.send_header("Content-Range", said)
        self.send_header("Content-Length", str(stop - start))
        for key, value in hub.headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.write(body)


class QuietServer(ThreadingHTTPServer):
    """A server that says nothing when a client goes away, which is what they should do."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub that serves the embedded model as someone/tiny."""
    hub = Hub(cache=tmp_path / "hf")
    servers = []
    for kind in (Answers, FileAnswers):
        bound = type("Bound", (kind,), {"hub": hub})
        server = QuietServer(("127.0.0.1", 0), bound)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()


def test_headers_by_range_equal_the_folder(hub: Hub) -> None:
    local = tiny()
    found = hub.ask(NAME)
    assert found["digest"] == source_digest(local)
    assert found["side_files"] == {**local.side_files, SUBFOLDER_FILES[0]: 9}
    assert found["unread"] == ["additional_chat_templates/a.safetensors", "original/"]
    assert found["id"] == NAME
    assert found["root"] is None
    assert COMMIT in found["notes"][0]
    weights = sum(path.stat().st_size for path in TINY.glob("*.safetensors"))
    assert hub.served < weights / 10


def test_nothing_is_stored_by_a_plan(hub: Hub) -> None:
    hub.ask(NAME)
    assert not list(hub.cache.rglob("*.safetensors"))
    assert not list(hub.cache.rglob("config.json"))


def test_token_goes_to_the_hub_and_to_nobody_else(hub: Hub) -> None:
    hub.token = "hf_secret"
    assert hub.ask(NAME, HF_TOKEN="hf_secret")["tensors"] == 375
    assert {sent for role, _, sent in hub.asked if role == "hub"} == {"Bearer hf_secret"}
    assert {sent for role, _, sent in hub.asked if role == "cdn"} == {None}


def test_revision_is_asked_for_and_files_are_of_its_commit(hub: Hub) -> None:
    assert hub.ask(f"{NAME}@v1")["tensors"] == 375
    paths = [path for role, path, _ in hub.asked if role == "hub"]
    assert paths[0] == f"/api/models/{NAME}/revision/v1?blobs=true"
    assert all(path.startswith(f"/{NAME}/resolve/{COMMIT}/") for path in paths[1:])


def test_absent_repository_and_revision(hub: Hub) -> None:
    assert hub.codes("someone/absent") == ["hub-not-found"]
    assert hub.codes(f"{NAME}@absent") == ["hub-not-found"]


def test_private_or_gated_says_how_to_get_access(hub: Hub) -> None:
    hub.refusal = (403, "GatedRepo")
    [[code, message, cure]] = hub.ask(NAME)["errors"]
    assert code == "hub-no-access"
    assert NAME in message
    assert f"{hub.endpoint}/{NAME}" in cure
    assert "HF_TOKEN" in cure
    hub.token = "hf_secret"
    assert hub.codes(NAME, HF_TOKEN="hf_wrong") == ["hub-no-access"]


def test_server_without_ranges_is_refused_before_it_sends_the_weights(
    hub: Hub, tmp_path: Path
) -> None:
    hub.ranges = False
    hub.folder = tmp_path / "large"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    size = 64_000_000
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"a": entry}).encode()
    with (hub.folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert hub.codes(NAME) == ["hub-no-ranges"]
    # Not zero: what fits into the sockets' buffers is on its way before anybody can refuse.
    assert hub.served < size / 3


def test_waits_and_asks_again_when_the_hub_is_busy(hub: Hub) -> None:
    hub.failures = 2
    assert hub.ask(NAME)["tensors"] == 375
    hub.failures = 1000
    assert hub.codes(NAME) == ["hub-failed"]


@pytest.mark.parametrize(
    ("asked", "until"),
    [
        ({"Retry-After": "100000"}, "wait until 20"),
        ({"Retry-After": "9" * 5000}, "wait for ever"),
        ({"Retry-After": "Fri, 01 Jan 2199 00:00:00 GMT"}, "wait until 2199-01-01 00:00 UTC"),
        ({"RateLimit": '"api";r=0;t=299'}, "wait until 20"),
    ],
)
def test_a_hub_that_asks_for_a_long_wait_is_not_waited_for(
    hub: Hub, asked: dict[str, str], until: str
) -> None:
    hub.failures, hub.busy = 1000, asked
    started = time.monotonic()
    ((code, message, _),) = hub.ask(NAME)["errors"]
    assert code == "hub-failed"
    assert until in message
    assert len(hub.asked) == 1
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "asked", ["1", "soon", "-5", "", "Sat, 01 Jan 2000 00:00:00 GMT", "Mon, 99 Abc 2030"]
)
def test_a_hub_that_asks_for_a_short_wait_is_asked_again(hub: Hub, asked: str) -> None:
    hub.failures, hub.busy = 1, {"Retry-After": asked}
    assert hub.ask(NAME)["tensors"] == 375


def test_an_answer_that_drips_is_given_up(hub: Hub) -> None:
    hub.drips = True
    ((code, message, _),) = hub.ask(NAME)["errors"]
    assert code == "hub-failed"
    assert "its answer is too slow" in message


def test_answers_that_break_off(hub: Hub) -> None:
    hub.cut = 5
    assert hub.codes(NAME) == ["hub-failed"]


def test_answers_that_do_not_come(hub: Hub) -> None:
    hub.delay = 3
    assert hub.codes(NAME, HF_HUB_DOWNLOAD_TIMEOUT="1") == ["hub-failed"]


@pytest.mark.parametrize("said", ["bytes 0-9/99", "bytes */99", "nonsense"])
def test_another_range_than_asked_for(hub: Hub, said: str) -> None:
    hub.content_range = said
    assert hub.codes(NAME) == ["hub-failed"]


def test_texts_of_servers_are_escaped_and_cut(hub: Hub) -> None:
    hub.content_range = "bytes \x1b[31m0-1\x9b/2" + "9" * 9000
    ((code, message, _),) = hub.ask(NAME)["errors"]
    assert code == "hub-failed"
    assert r'it sent "bytes \x1b[31m0-1\x9b/29' in message
    assert len(message) < 3000
    hub.content_range = None
    hub.listing = {"siblings": [{"rfilename": "\x1b\nx\u202e"}]}
    ((code, message, _),) = hub.ask(NAME)["errors"]
    assert code == "hub-failed"
    assert message.isprintable()
    hub.listing = {}
    hub.refusal = (418, "\x1b[31m")
    ((_, message, _),) = hub.ask(NAME)["errors"]
    assert message.isprintable()


def test_compressed_answers_are_refused(hub: Hub) -> None:
    hub.headers = {"Content-Encoding": "gzip"}
    assert hub.codes(NAME) == ["hub-failed"]


@pytest.mark.parametrize(
    "listing",
    [
        {"sha": None},
        {"sha": "../../elsewhere"},
        {"siblings": None},
        {"siblings": [{"rfilename": "config.json"}]},
        {"siblings": [{"rfilename": 3, "size": 3}]},
        {"siblings": [{"rfilename": "a\ud800", "size": 3}]},
        {"siblings": [{"rfilename": "config.json", "size": True}]},
        {"siblings": "nothing"},
    ],
)
def test_listing_that_cannot_be_understood(hub: Hub, listing: dict[str, Any]) -> None:
    hub.listing = listing
    assert hub.codes(NAME) == ["hub-failed"]


def test_listing_without_weights(hub: Hub) -> None:
    hub.listing = {"siblings": [{"rfilename": "pytorch_model.bin", "size": 3}]}
    assert hub.codes(NAME) == ["missing-config", "pickled-weights"]


def test_damaged_shard(hub: Hub, tmp_path: Path) -> None:
    hub.folder = tmp_path / "damaged"
    hub.folder.mkdir()
    for path in TINY.iterdir():
        (hub.folder / path.name).write_bytes(path.read_bytes())
    (hub.folder / SHARD).write_bytes(b"\xff" * 100)
    assert hub.codes(NAME) == ["not-safetensors"]


def test_endpoint_that_is_no_url_or_answers_nothing(hub: Hub) -> None:
    assert hub.codes(NAME, HF_ENDPOINT="http://[") == ["hub-failed"]
    assert hub.codes(NAME, HF_ENDPOINT="gopher://x") == ["hub-failed"]
    assert hub.codes(NAME, HF_ENDPOINT="http://127.0.0.1:9") == ["hub-failed"]


def test_catalog_is_taken_before_the_hub(hub: Hub) -> None:
    found = hub.ask("MiniMaxAI/MiniMax-M2.7")
    assert found["tensors"] == 96_103
    assert "catalog" in found["notes"][0]
    assert hub.asked == []
    assert hub.codes("MiniMaxAI/MiniMax-M2.7@main") == ["hub-not-found"]


def _fill_cache(hub: Hub, leave_out: str = "") -> Path:
    """A snapshot as huggingface_hub lays it out: links to blobs, and a ref to the commit."""
    repository = hub.cache / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(TINY.iterdir())):
        if path.name != leave_out:
            (repository / "blobs" / str(number)).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize("reference", [NAME, f"{NAME}@main", f"{NAME}@{COMMIT}"])
def test_whole_snapshot_in_the_cache_is_read_there(hub: Hub, reference: str) -> None:
    snapshot = _fill_cache(hub)
    found = hub.ask(reference, HF_HUB_OFFLINE="1")
    assert found["root"] == str(snapshot)
    assert found["digest"] == source_digest(tiny())
    assert found["id"] == NAME
    assert hub.asked == []


def test_a_snapshot_that_was_fetched_by_commit_is_used(hub: Hub) -> None:
    snapshot = _fill_cache(hub)
    shutil.rmtree(snapshot.parents[1] / "refs")
    found = hub.ask(NAME, HF_HUB_OFFLINE="1")
    assert found["root"] == str(snapshot)
    assert COMMIT in found["notes"][0]
    assert hub.ask(NAME)["root"] == str(snapshot)
    assert hub.asked == []


def test_between_two_commits_nothing_is_guessed(hub: Hub) -> None:
    snapshot = _fill_cache(hub)
    (snapshot.parents[1] / "refs" / "main").unlink()
    shutil.copytree(snapshot, snapshot.parent / ("f" * 40), symlinks=True)
    ((code, _, cure),) = hub.ask(NAME, HF_HUB_OFFLINE="1")["errors"]
    assert code == "hub-offline"
    assert cure == f"say which: {NAME}@{COMMIT}, {NAME}@{'f' * 40}"
    assert hub.ask(f"{NAME}@{'f' * 40}", HF_HUB_OFFLINE="1")["root"].endswith("f" * 40)


@pytest.mark.parametrize("leave_out", [SHARD, "config.json"])
def test_snapshot_in_part_is_no_model_offline_and_no_obstacle_online(
    hub: Hub, leave_out: str
) -> None:
    _fill_cache(hub, leave_out)
    assert hub.codes(NAME, HF_HUB_OFFLINE="1") == ["hub-offline"]
    assert hub.ask(NAME)["root"] is None


def test_damaged_snapshot_is_an_error(hub: Hub) -> None:
    snapshot = _fill_cache(hub)
    (snapshot / SHARD).resolve().write_bytes(b"\0" * 8)
    assert hub.codes(NAME) == ["not-safetensors"]


def test_offline_without_cache(hub: Hub) -> None:
    assert hub.codes(NAME, HF_HUB_OFFLINE="1") == ["hub-offline"]
    assert hub.asked == []
