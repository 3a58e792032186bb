"""Who runs the units of a build: a protocol of one method, and threads of this program."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Protocol

from emitters.core.run_unit import Receipt, Work
from emitters.core.work_units import Unit

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
            except GeneratorExit:
                _cancel(running)
                raise
            except BaseException:
                _cancel(running)
                for future, unit in running.items():
                    if not future.cancelled() and future.exception() is None:
                        yield unit, future.result()
                raise


def _cancel(running: Iterable[Future[Receipt]]) -> None:
    """Start no more of these, and wait for those under way."""
    for future in running:
        future.cancel()
    wait(running)
