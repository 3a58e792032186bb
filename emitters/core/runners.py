"""Who runs the units of a build: a protocol of one method, and threads of this program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from typing import Protocol

from emitters.core.journal import Journal
from emitters.core.progress import Progress
from emitters.core.run_unit import Receipt, Work
from emitters.core.work_units import Spans, Unit, merge_spans
from policy_dsl.diagnostics import fail

Receipts = Generator[tuple[Unit, Receipt], None, None]


class Runner(Protocol):
    """Runs units of a build anywhere, in any order, each at least once.

    Units and `work` can be pickled. Units are taken from the iterable as they are needed.
    """

    def run(self, units: Iterable[Unit], work: Work) -> Receipts:
        """The receipt of every unit for which `work(unit)` has ended, in any order.

        A unit without a receipt counts as lost, and is given to a later call of `run`.
        Raises: what a unit raised, after the receipts of those that have ended.
        """
        ...


class Threads:
    """`jobs` threads: kernels, reads, writes and hashes release the GIL."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def run(self, units: Iterable[Unit], work: Work) -> Receipts:
        """The receipts of units as they end; the first error of one ends them all.

        Also after KeyboardInterrupt, the receipts of units under way come first.
        """
        left = iter(units)
        running: dict[Future[Receipt], Unit] = {}
        with ThreadPoolExecutor(self.jobs, "unit") as workers:
            try:
                while True:
                    # One in work and one at hand for each worker, whatever the plan's size.
                    for unit in islice(left, 2 * self.jobs - len(running)):
                        running[workers.submit(work, unit)] = unit
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        receipt = future.result()
                        yield running.pop(future), receipt
            except BaseException as error:
                for future in running:
                    future.cancel()
                wait(running)
                for future, unit in running.items():
                    is_wanted = not isinstance(error, GeneratorExit)
                    if is_wanted and not future.cancelled() and future.exception() is None:
                        yield unit, future.result()
                raise


def write_tensors(
    run: Callable[[Mapping[int, Spans]], Receipts], left: int, journal: Journal, progress: Progress
) -> list[Unit]:
    """Write all rows that are not on disk yet; returns the units whose values all became 0.

    run(done): of the units without the rows in `done`. left: bytes of weights that they read.
    Raises: what the work raises; PolicyError if the runner brings nothing back.
    """
    lost: list[Unit] = []
    done = dict(journal.done)
    while left:
        ended: dict[int, set[tuple[int, int]]] = defaultdict(set)
        with closing(run(done)) as receipts:
            for unit, receipt in receipts:
                if unit.span in ended[unit.module]:
                    continue
                ended[unit.module].add(unit.span)
                # One whose values are lost must be found again by the next run.
                if receipt.is_lost:
                    lost.append(unit)
                else:
                    # Without what its method computed, which may be large.
                    journal.add(unit._replace(context=None), receipt)
                left -= unit.source_nbytes
                progress.advance(unit.source_nbytes)
        if not ended:
            raise fail("units-lost", suggestion="run the same command again: it is resumed")
        for module, spans in ended.items():
            done[module] = merge_spans((*done.get(module, ()), *spans))
    return lost
