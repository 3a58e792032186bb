"""Peers of packed checkpoints, each in an interpreter of its own.

AutoRound and GPTQModel replace parts of transformers, AutoRound also while it loads a model:
neither may be imported where another test needs transformers as it is.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from typing import Any

# Ten times what the longest answers take.
LONGEST_SECONDS = 300


@contextmanager
def interpreter(module: str, **environment: str) -> Iterator[Callable[..., Any]]:
    """Calls a function of a module of this folder by its name.

    environment: variables that are set before the module is imported. A peer that comes to no
    end is ended, and asked once more: GPTQModel waits for its own threads now and then.
    """
    # What is forked would share the threads of torch.
    start = partial(ProcessPoolExecutor, 1, get_context("spawn"), _set, (environment,))
    with ExitStack() as opened:
        pools = [opened.enter_context(start())]

        def call(name: str, *arguments: Any, **options: Any) -> Any:
            question = _called, module, name, arguments, options
            try:
                return pools[-1].submit(*question).result()
            except BrokenProcessPool:
                pools.append(opened.enter_context(start()))
                return pools[-1].submit(*question).result()

        yield call


def _set(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _called(module: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    # Shows where its threads are, and ends it.
    faulthandler.dump_traceback_later(LONGEST_SECONDS, exit=True, file=sys.__stderr__)
    try:
        return getattr(import_module(module), name)(*arguments, **options)
    finally:
        faulthandler.cancel_dump_traceback_later()
