"""A model of the hub to its Inventory, from headers over HTTP.

huggingface_hub gives the session (proxies, the offline switch), the token, and the waiting after
broken connections. Its own listing and its readers of headers and ranges are not used: they have
no bound, where a server knows no ranges they would fetch the whole file, and after 429 and 5xx
they wait for as long as a server asks.
"""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from math import ceil
from time import monotonic, sleep
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, http_stream_backoff

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import diagnostic, fail
from policy_dsl.inventory import Inventory
from policy_dsl.sources.checkpoint import UnreachableError, read_checkpoint
from policy_dsl.sources.side_files import is_looked_at, unread

MAX_LISTING_NBYTES = 64_000_000
WORKERS = 8
RETRIES = 4
FIRST_WAIT_SECONDS = 0.5
# A server that asks for more is reported, not waited for.
LONGEST_WAIT_SECONDS = 60
# An answer that is slower than this on average, after some seconds, is given up.
SLOWEST_BYTES_PER_SECOND = 1024
PATIENCE_SECONDS = 10.0

_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_BUSY = (429, 500, 502, 503, 504)
# The base of its HTTP library's errors, httpx's or httpx2's by huggingface_hub's version.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__mro__[1]
# RuntimeError: another thread closed the shared session after a broken connection.
_FAILURES = (_HTTP_ERROR, OSError, ValueError, RuntimeError)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
# As the hub writes it: `"api";r=0;t=55`, nothing left for 55 seconds.
_RATE_LIMIT = re.compile(r"\br=0\s*;\s*t=(\d+)")


class _Answer(Protocol):
    """What is used of the HTTP library's response; names of headers in any case."""

    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    def iter_raw(self) -> Iterator[bytes]:
        """The body as it comes."""


@dataclass(frozen=True)
class HubFiles:
    """The files of a repository, `place`, at one commit; in folders, the known side files."""

    place: str
    commit: str
    sizes: Mapping[str, int]
    unread: tuple[str, ...]

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop` of a file.

        Raises: PolicyError if the hub refuses, fails or knows no ranges, or the file differs.
        """
        if start == stop:
            return b""
        url = hf_hub_url(self.place, file, revision=self.commit)
        part = (start, stop, self.sizes[file])
        request = _Request(url, f"{self.place}/{file}", self.place, part)
        content, _ = request.fetch(stop - start)
        if len(content) != stop - start:
            raise request.failed(f"{len(content)} bytes came, not {stop - start}")
        return content


def open_hub(repository: str, revision: str | None) -> Inventory:
    """The model's inventory from the hub; its root is None, for the weights stay there.

    Raises: PolicyError if the hub cannot be asked, refuses, or the checkpoint has defects.
    """
    what = repository if revision is None else f"{repository}@{revision}"
    if constants.HF_HUB_OFFLINE:
        raise fail("hub-offline", what=what)
    files = _files(repository, revision, what)
    # Many shards at once: over a network, waiting is what takes the time.
    pool = ThreadPoolExecutor(WORKERS)
    try:
        model = read_checkpoint(files, name=repository, apply=pool.map)
    finally:
        # After a refusal or an interrupt the shards still to come are not asked for.
        pool.shutdown(cancel_futures=True)
    note = f"headers read from {constants.ENDPOINT}, commit {files.commit}"
    return replace(model, notes=(note,), commit=files.commit)


def _files(repository: str, revision: str | None, what: str) -> HubFiles:
    """The repository's files at the commit that the hub names for the revision."""
    endpoint = constants.ENDPOINT
    if not _is_url(endpoint):
        raise fail("hub-failed", what="HF_ENDPOINT", reason=f'"{endpoint}" is not a URL')
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    # Sizes come only when asked for by `blobs`.
    request = _Request(f"{endpoint}/api/models/{repository}{at}?blobs=true", what, repository)
    text, is_whole = request.fetch(MAX_LISTING_NBYTES)
    if len(text) > MAX_LISTING_NBYTES:
        raise request.failed(f"its answer has more than {MAX_LISTING_NBYTES} bytes")
    if not is_whole:
        raise request.failed(f"its answer broke off after {len(text)} bytes")
    try:
        listing = parse_json(text)
        commit = listing["sha"]
        sizes = dict(_size(entry) for entry in listing["siblings"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"its listing of files cannot be understood ({type(error).__name__}: {error})"
        raise fail("hub-failed", what=what, reason=reason) from error
    # Every file is read at this commit, so that a push in between mixes nothing.
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise fail("hub-failed", what=what, reason="its listing of files names no commit")
    listed = {file: size for file, size in sorted(sizes.items()) if is_looked_at(file)}
    return HubFiles(repository, commit, listed, unread(sizes))


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _size(entry: Mapping[str, Any]) -> tuple[str, int]:
    file, size = entry["rfilename"], entry["size"]
    if type(file) is not str or not file.isprintable():
        raise ValueError("a file has no name that can be printed")
    if type(size) is not int or size < 0:
        raise ValueError(f"{file} has no size")
    return file, size


@dataclass(frozen=True)
class _Request:
    """A document, or the bytes `start` to `stop` of a file of so many; what: in messages."""

    url: str
    what: str
    repository: str
    part: tuple[int, int, int] | None = None

    def fetch(self, limit: int) -> tuple[bytes, bool]:
        """The body, cut after `limit` and some, and whether it ended as HTTP says it should."""
        # A compressed range could not be placed, and a compressed document not be bounded.
        asked = {"Accept-Encoding": "identity"}
        if self.part:
            asked["Range"] = f"bytes={self.part[0]}-{self.part[1] - 1}"
        headers, pause = build_hf_headers(library_name="policyc", headers=asked), FIRST_WAIT_SECONDS
        # It tries again after broken connections, and the body is still to come.
        settings: dict[str, Any] = {"max_retries": RETRIES, "base_wait_time": pause}
        settings |= {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "retry_on_status_codes": ()}
        content, is_whole = b"", False
        for left in reversed(range(RETRIES + 1)):
            wait = 0.0
            try:
                with http_stream_backoff("GET", self.url, headers=headers, **settings) as answer:
                    if answer.status_code in _BUSY and left:
                        wait = self._asked_wait(answer.headers)
                    else:
                        self._check(answer)
                        content, is_whole = self._body(answer, limit)
            except _FAILURES as error:
                reason = str(error) or type(error).__name__
                raise self.failed(f"{constants.ENDPOINT} does not answer: {reason}") from error
            if is_whole or not left:
                break
            sleep(wait or pause)
            pause *= 2
        return content, is_whole

    def failed(self, reason: str) -> UnreachableError:
        """The error of a hub that does not do what it should."""
        return self._error("hub-failed", reason=reason)

    def _error(self, code: str, **facts: Any) -> UnreachableError:
        return UnreachableError([diagnostic(code, what=self.what, **facts)])

    def _check(self, answer: _Answer) -> None:
        """Raises: UnreachableError if the answer's body is not what was asked for."""
        status = answer.status_code
        if status not in (200, 206):
            raise self._refused(status, answer.headers)
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise self.failed("its answer is compressed, which was not asked for")
        if self.part is None:
            return
        start, stop, size = self.part
        said = answer.headers.get("Content-Range", "no range")
        place = _CONTENT_RANGE.fullmatch(said)
        if status == 206:
            if place is None or tuple(map(int, place.groups())) != (start, stop - 1, size):
                wanted = f"{start}-{stop - 1}/{size}"
                raise self.failed(f'asked for bytes {wanted}, it sent "{said}"')
        # A small file sent whole, though a range was asked for, is as good.
        elif stop - start != size:
            cure = "fetch the whole model, or use an endpoint that serves ranges"
            raise self._error("hub-no-ranges", size=size, suggestion=cure)

    def _refused(self, status: int, headers: Mapping[str, str]) -> UnreachableError:
        if status == 404:
            return self._error("hub-not-found")
        if status not in (401, 403):
            return self.failed(f"the server answers HTTP {status}")
        page = f"{constants.ENDPOINT}/{self.repository}"
        cure = f"ask for access at {page}, then `hf auth login` or set HF_TOKEN"
        is_gated = headers.get("X-Error-Code") == "GatedRepo"
        notes = [] if is_gated else ["a repository that does not exist is refused like this, too"]
        return self._error("hub-no-access", status=status, suggestion=cure, notes=notes)

    def _asked_wait(self, headers: Mapping[str, str]) -> float:
        """The seconds for which a busy server asks to be left alone; 0 if it does not say."""
        limited = _RATE_LIMIT.search(headers.get("RateLimit", ""))
        asked = (headers.get("Retry-After", ""), limited[1] if limited else "")
        if (seconds := max(map(_seconds, asked))) <= LONGEST_WAIT_SECONDS:
            return seconds
        try:
            end = datetime.now(UTC) + timedelta(seconds=ceil(seconds))
            until = f"until {end:%Y-%m-%d %H:%M} UTC"
        except OverflowError:
            until = "for ever"
        raise self.failed(f"the server is busy and asks to wait {until}: try again then")

    def _body(self, answer: _Answer, limit: int) -> tuple[bytes, bool]:
        content, started = bytearray(), monotonic()
        try:
            for chunk in answer.iter_raw():
                content += chunk
                # What goes on beyond the limit is never taken.
                if len(content) > limit:
                    break
                elapsed = monotonic() - started
                if elapsed > PATIENCE_SECONDS + len(content) / SLOWEST_BYTES_PER_SECOND:
                    came = f"{len(content)} bytes came in {elapsed:.0f} seconds"
                    raise self.failed(f"its answer is too slow: {came}")
        except _FAILURES:
            return bytes(content), False
        return bytes(content), True


def _seconds(written: str) -> float:
    """What a Retry-After means from now on: seconds, or a date; 0 for anything else."""
    if written.isascii() and written.isdecimal():
        # More digits would be no float, and are as much too long.
        return float(written[:12])
    try:
        date = parsedate_to_datetime(written)
        return (date.astimezone(UTC) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return 0
