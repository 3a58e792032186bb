"""Units run by threads, few in flight; whatever stops the build, finished work is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

from emitters.core.blocks import Outcome, Site, run_unit
from emitters.core.journal import Savepoints
from emitters.core.units import Unit

Finished = Callable[[Unit, Outcome], None]


def run_units(
    units: Iterator[Unit], site: Site, savepoints: Savepoints, *, jobs: int, finished: Finished
) -> None:
    """Run all units on `jobs` threads; `finished(unit, outcome)` is called for each one.

    Kernels, reads, writes and hashes release the GIL, so that threads are enough. Files are
    flushed and the journal is written by a thread of its own.
    Raises: the first error of a unit, after the others in flight have ended and what is
    finished is in the journal; KeyboardInterrupt likewise.
    """
    # Flushing waits for the disk; meanwhile the workers go on.
    saver = ThreadPoolExecutor(1, "savepoint")
    with saver, ThreadPoolExecutor(jobs, "unit") as workers:
        running: dict[Future[Outcome], Unit] = {}
        saving: list[Future[None]] = []
        try:
            # Two units a worker: one in work and one at hand, whatever the plan's size.
            while _refill(running, units, workers, site, 2 * jobs):
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    unit, outcome = running.pop(future), future.result()
                    finished(unit, outcome)
                    _keep(savepoints, unit, outcome)
                saving = _checked(saving)
                if savepoints.due() and not saving:
                    saving.append(saver.submit(savepoints.save, savepoints.take()))
        finally:
            _settle(running, savepoints)
            saving.append(saver.submit(savepoints.save, savepoints.take()))
    for saved in saving:
        saved.result()


def _refill(
    running: dict[Future[Outcome], Unit],
    units: Iterator[Unit],
    workers: ThreadPoolExecutor,
    site: Site,
    limit: int,
) -> bool:
    """Bring the units in flight up to the limit; False when none is left."""
    for unit in islice(units, limit - len(running)):
        running[workers.submit(run_unit, site, unit)] = unit
    return bool(running)


def _checked(saving: list[Future[None]]) -> list[Future[None]]:
    """The saves still under way. Raises: the error of one that failed."""
    for saved in saving:
        if saved.done():
            saved.result()
    return [saved for saved in saving if not saved.done()]


def _settle(running: dict[Future[Outcome], Unit], savepoints: Savepoints) -> None:
    """Start no more units, wait for those under way, keep those that succeeded."""
    for future in running:
        future.cancel()
    wait(running)
    # What ended well while another unit failed is kept: the next run need not repeat it.
    for future, unit in running.items():
        if not future.cancelled() and future.exception() is None:
            _keep(savepoints, unit, future.result())


def _keep(savepoints: Savepoints, unit: Unit, outcome: Outcome) -> None:
    """A finished unit for the journal. One whose values are lost must be found again."""
    if not outcome.is_lost:
        savepoints.add(unit)
