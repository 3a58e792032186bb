"""Peers of packed checkpoints, each in an interpreter of its own.

AutoRound and GPTQModel replace parts of transformers, AutoRound also while it loads a model:
neither may be imported where another test needs transformers as it is.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def interpreter(module: str, **environment: str) -> Iterator[Callable[..., Any]]:
    """Calls a function of a module of this folder by its name.

    environment: variables that are set before the module is imported.
    """
    # What is forked would share the threads of torch.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _set, (environment,)) as pool:

        def call(name: str, *arguments: Any, **options: Any) -> Any:
            return pool.submit(_called, module, name, arguments, options).result()

        yield call


def _set(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _called(module: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return getattr(import_module(module), name)(*arguments, **options)
