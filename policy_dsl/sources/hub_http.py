"""Bytes from the hub over HTTP, never more than asked for.

    fetch(address, limit=…)  a small document     fetch_range(address, start, stop, size=…)

huggingface_hub gives the session (proxies, the offline switch), the token, and the waiting
after broken connections. After 429 and 5xx it would wait for as long as a server asks, so that
is done here. Its own reader of safetensors headers is not used: where a server knows no ranges,
that would fetch the whole file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from math import ceil
from time import monotonic, sleep
from typing import Protocol

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, http_stream_backoff

from policy_dsl.diagnostics import diagnostic
from policy_dsl.sources.checkpoint import UnreachableError

ATTEMPTS = 3
RETRIES = 4
FIRST_WAIT_SECONDS = 0.5
# A server that asks for more is reported, not waited for.
LONGEST_WAIT_SECONDS = 60
# An answer that is slower than this on average, after some seconds, is given up.
SLOWEST_BYTES_PER_SECOND = 1024
PATIENCE_SECONDS = 10.0

_BUSY = (429, 500, 502, 503, 504)
# The base of its HTTP library's errors, httpx's or httpx2's by huggingface_hub's version.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__mro__[1]
# RuntimeError: another thread closed the shared session after a broken connection.
_FAILURES = (_HTTP_ERROR, OSError, ValueError, RuntimeError)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
# As the hub writes it: `"api";r=0;t=55`, nothing left for 55 seconds.
_RATE_LIMIT = re.compile(r"\br=0\s*;\s*t=(\d+)")


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
    wait = FIRST_WAIT_SECONDS
    for left in reversed(range(RETRIES + 1)):
        try:
            with http_stream_backoff(
                "GET",
                address.url,
                headers=sent,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                max_retries=RETRIES,
                base_wait_time=FIRST_WAIT_SECONDS,
                retry_on_status_codes=(),
            ) as answer:
                if answer.status_code not in _BUSY or not left:
                    _check_status(address, answer)
                    check(answer)
                    return _body(address, answer, limit)
                pause = _asked_wait(address, answer.headers) or wait
        except HfHubHTTPError as error:
            raise _refused(address, error.response) from error
        except _FAILURES as error:
            reason = str(error) or type(error).__name__
            said = f"{constants.ENDPOINT} does not answer: {reason}"
            raise _failed(address, said) from error
        sleep(pause)
        wait *= 2
    raise AssertionError("the last try returns or raises")


def _asked_wait(address: Address, headers: Mapping[str, str]) -> float:
    """The seconds for which a busy server asks to be left alone; 0 if it does not say.

    Raises: UnreachableError if they are more than anybody waits for.
    """
    asked, limited = headers.get("Retry-After", ""), headers.get("RateLimit", "")
    found = _RATE_LIMIT.search(limited)
    seconds = max(_seconds(asked), _seconds(found[1]) if found else 0)
    if seconds <= LONGEST_WAIT_SECONDS:
        return seconds
    until = _until(seconds)
    reason = f"the server is busy and asks to wait {until}: try again then"
    raise _failed(address, reason)


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


def _until(seconds: float) -> str:
    try:
        end = datetime.now(UTC) + timedelta(seconds=ceil(seconds))
    except OverflowError:
        return "for ever"
    return f"until {end:%Y-%m-%d %H:%M} UTC"


def _body(address: Address, answer: Answer, limit: int) -> tuple[bytes, bool]:
    found, started = bytearray(), monotonic()
    try:
        for chunk in answer.iter_raw():
            found += chunk
            # What goes on beyond the limit is never taken.
            if len(found) > limit:
                break
            elapsed = monotonic() - started
            if elapsed > PATIENCE_SECONDS + len(found) / SLOWEST_BYTES_PER_SECOND:
                got = f"{len(found)} bytes came in {elapsed:.0f} seconds"
                raise _failed(address, f"its answer is too slow: {got}")
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
