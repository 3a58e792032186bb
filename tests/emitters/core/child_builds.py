"""Builds in interpreters of their own, which can be killed or have their disk filled."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any

from emitters.core.build import Silent, build
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Plan

Planned = tuple[Plan, Inventory]
# A forked copy would hold the locks of threads that it does not have.
_SPAWN = multiprocessing.get_context("spawn")


class Slow(Silent):
    """Holds the loop up at every block, so that there is a moment to be killed at."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def advance(self, nbytes: int) -> None:
        time.sleep(self.seconds)


class StoppedAt(Silent):
    """Interrupts a build after so many blocks."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def advance(self, nbytes: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


class KilledAt(Silent):
    """Kills the program at the beginning or end of a stage."""

    def __init__(self, stage: str, *, end: bool) -> None:
        self.wanted, self.end_, self.now = stage, end, ""

    def begin(self, stage: str, total: int, done: int) -> None:
        self.now = stage
        if not self.end_ and stage == self.wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    def end(self) -> None:
        if self.end_ and self.now == self.wanted:
            os.kill(os.getpid(), signal.SIGKILL)


class FullDisk(Silent):
    """From the first stage on no byte past the first 20 kB of a file can be written."""

    def begin(self, stage: str, total: int, done: int) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))


def start_build(planned: Planned, **options: Any) -> BaseProcess:
    """A program that builds, just started; options as `build` takes them."""
    started = _SPAWN.Process(target=build, args=planned, kwargs=options)
    started.start()
    return started


def refusals_of_build(planned: Planned, **options: Any) -> list[str]:
    """The codes of what a build in a program of its own is refused for."""
    with ProcessPoolExecutor(1, _SPAWN) as pool:
        return pool.submit(_refusals, planned, options).result()


def _refusals(planned: Planned, options: dict[str, Any]) -> list[str]:
    try:
        build(*planned, **options)
    except PolicyError as error:
        return [finding.code for finding in error.diagnostics]
    return []
