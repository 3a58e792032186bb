"""Bytes from the hub over HTTP, never more than asked for.

    fetch(address, limit=…)  a small document     fetch_range(address, start, stop, size=…)

huggingface_hub gives the session (proxies, the offline switch), the token, and the waiting
after 429, 5xx and broken connections. Its own reader of safetensors headers is not used:
where a server knows no ranges, that would fetch the whole file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, http_stream_backoff

from policy_dsl.diagnostics import diagnostic
from policy_dsl.sources.checkpoint import UnreachableError

ATTEMPTS = 3
RETRIES = 4
FIRST_WAIT_SECONDS = 0.5

# The base of its HTTP library's errors, httpx's or httpx2's by huggingface_hub's version.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__mro__[1]
# RuntimeError: another thread closed the shared session after a broken connection.
_FAILURES = (_HTTP_ERROR, OSError, ValueError, RuntimeError)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class Answer(Protocol):
    """What is used of the HTTP library's response."""

    @property
    def status_code(self) -> int:
        """HTTP's status, after redirects."""

    @property
    def headers(self) -> Mapping[str, str]:
        """HTTP's headers; names in any case."""

    def iter_raw(self) -> Iterator[bytes]:
        """The body as it comes."""


@dataclass(frozen=True)
class Address:
    """A URL; `what` names it in messages, `page` is where people ask for access."""

    url: str
    what: str
    page: str


def fetch(address: Address, *, limit: int) -> bytes:
    """The whole body of a document that has at most `limit` bytes.

    Raises: UnreachableError if the hub refuses or fails, or the document is larger.
    """
    found, whole = _request(address, {}, limit, lambda answer: None)
    if len(found) > limit:
        raise _failed(address, f"its answer has more than {limit} bytes")
    if not whole:
        raise _failed(address, f"its answer broke off after {len(found)} bytes")
    return found


def fetch_range(address: Address, start: int, stop: int, *, size: int) -> bytes:
    """Exactly the bytes `start` to `stop` of a file of `size` bytes.

    Raises: UnreachableError if the hub refuses, fails or knows no ranges, or the file differs.
    """
    if start == stop:
        return b""

    def check(answer: Answer) -> None:
        if answer.status_code == 206:
            _check_range(address, answer, (start, stop, size))
        # A small file sent whole, though a range was asked for, is as good.
        elif stop - start != size:
            cure = "fetch the whole model, or use an endpoint that serves ranges"
            raise UnreachableError(
                [diagnostic("hub-no-ranges", what=address.what, size=size, suggestion=cure)]
            )

    wanted = {"Range": f"bytes={start}-{stop - 1}"}
    found, _ = _request(address, wanted, stop - start, check)
    if len(found) != stop - start:
        raise _failed(address, f"{len(found)} bytes came, not {stop - start}")
    return found


def _request(
    address: Address, headers: dict[str, str], limit: int, check: Callable[[Answer], None]
) -> tuple[bytes, bool]:
    """The body, cut after `limit` and some, and whether it ended as HTTP says it should."""
    found, whole = b"", False
    for _ in range(ATTEMPTS):
        found, whole = _attempt(address, headers, limit, check)
        if whole:
            break
    return found, whole


def _attempt(
    address: Address, headers: dict[str, str], limit: int, check: Callable[[Answer], None]
) -> tuple[bytes, bool]:
    # A compressed range could not be placed, and a compressed document not be bounded.
    sent = build_hf_headers(
        library_name="policyc", headers={"Accept-Encoding": "identity", **headers}
    )
    try:
        with http_stream_backoff(
            "GET",
            address.url,
            headers=sent,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            max_retries=RETRIES,
            base_wait_time=FIRST_WAIT_SECONDS,
        ) as answer:
            _check_status(address, answer)
            check(answer)
            return _body(answer, limit)
    except HfHubHTTPError as error:
        raise _refused(address, error.response) from error
    except _FAILURES as error:
        reason = str(error) or type(error).__name__
        raise _failed(address, f"{constants.ENDPOINT} does not answer: {reason}") from error


def _body(answer: Answer, limit: int) -> tuple[bytes, bool]:
    found = bytearray()
    try:
        for chunk in answer.iter_raw():
            found += chunk
            # What goes on beyond the limit is never taken.
            if len(found) > limit:
                break
    except _FAILURES:
        # Not raised here: inside its context the waiting would start over and fail.
        return bytes(found), False
    return bytes(found), True


def _check_status(address: Address, answer: Answer) -> None:
    if answer.status_code not in (200, 206):
        raise _refused(address, answer)
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise _failed(address, "its answer is compressed, which was not asked for")


def _check_range(address: Address, answer: Answer, wanted: tuple[int, int, int]) -> None:
    said = answer.headers.get("Content-Range", "no range")
    parts = _CONTENT_RANGE.fullmatch(said)
    start, stop, size = wanted
    if parts is None or tuple(map(int, parts.groups())) != (start, stop - 1, size):
        raise _failed(address, f'asked for bytes {start}-{stop - 1}/{size}, it sent "{said}"')


def _refused(address: Address, answer: Answer) -> UnreachableError:
    what, status = address.what, answer.status_code
    gated = answer.headers.get("X-Error-Code") == "GatedRepo"
    if status == 404:
        return UnreachableError([diagnostic("hub-not-found", what=what)])
    if status not in (401, 403):
        return _failed(address, f"the server answers HTTP {status}")
    cure = f"ask for access at {address.page}, then `hf auth login` or set HF_TOKEN"
    notes = [] if gated else ["a repository that does not exist is refused like this, too"]
    found = diagnostic("hub-no-access", what=what, status=status, suggestion=cure, notes=notes)
    return UnreachableError([found])


def _failed(address: Address, reason: str) -> UnreachableError:
    return UnreachableError([diagnostic("hub-failed", what=address.what, reason=reason)])
