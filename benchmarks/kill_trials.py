"""Builds of each target that are killed or lose power, and what running them again makes of it.

    python benchmarks/kill_trials.py
    python benchmarks/kill_trials.py --sample 10 --target gptq

A build is killed at random moments, and before every write, sync, rename and deletion that it
asks for; over nothing and over another bundle. Power loss is a kill after which what was not
synced is there, or not: see `lost_writes` beside the tests. Whatever is left, `<out>` is not
there, or the old bundle, or the new one; the same command then ends with the bytes of an
undisturbed build, and leaves nothing beside them. All wrong ones must be 0.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from damage_trials import POLICIES, ROOT, policyc, write_model

sys.path.insert(0, str(ROOT / "tests" / "emitters" / "core"))

from event_log import Event, EventLog
from lost_writes import Node, after_power_loss, chance, every_luck

from emitters.core import journal

OLD = "target mlx_affine\nall: 8bit g64; router, norm: bf16\n"
# Some shards, so that files of one bundle differ in how far they are.
SHARDS = {"mlx_affine": "output shard_size 500KiB", "gptq": "output shard_size 500KiB"}
MOMENTS = 25
# An event of which there are many alike, and how many of them there are for one trial.
ALIKE, EVERY = "write", 3


@dataclass(frozen=True)
class Subject:
    """A build to be killed: its command, the bundle that it makes, the one it may replace."""

    target: str
    command: tuple[str, ...]
    old: Path
    new: Path

    def arguments(self, out: Path, jobs: int, *, force: bool) -> list[str]:
        """The command line of the build."""
        more = ["--force"] if force else []
        return [*self.command, "-o", str(out), "-j", str(jobs), "-q", *more]


@dataclass(frozen=True)
class Setting:
    """How a build runs. force: over another bundle."""

    jobs: int
    force: bool = False

    def __str__(self) -> str:
        workers = "1 worker" if self.jobs == 1 else f"{self.jobs} workers"
        return f"{workers}, --force" if self.force else workers


def make_subject(work: Path, target: str) -> Subject:
    """The undisturbed bundle of a target, and another one."""
    source, old = work / "source", work / "old"
    if not source.exists():
        write_model(source, 1)
        _build(work, OLD, source, old)
    text = f"target {target}\n{SHARDS.get(target, '')}\n{POLICIES[target]}\n"
    return Subject(target, _build(work, text, source, work / target), old, work / target)


def _build(work: Path, text: str, source: Path, out: Path) -> tuple[str, ...]:
    policy = work / f"{out.name}.qpol"
    policy.write_text(text)
    command = ("build", str(policy), "--model", str(source))
    if run([*command, "-o", str(out), "-q", "-j", "1"]):
        raise SystemExit(f"{out.name}: the bundle cannot be built")
    return command


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command, in this program and without a word."""
    sys.stdout.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        return policyc([*arguments])
    finally:
        for number, earlier in enumerate(kept, 1):
            os.dup2(earlier, number)
            os.close(earlier)
        os.close(nowhere)


def start(arguments: Sequence[str], log: EventLog | None = None) -> int:
    """The number of a program that runs a command: a copy of this one, which has no threads."""
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        with log.recording() if log else nullcontext():
            code = run(arguments)
    finally:
        os._exit(code)


def ended(number: int) -> int:
    """How a program ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def killed_before(events: Sequence[Event], number: int) -> Callable[[Event], None]:
    """Kills the program before the event that has this number in the log of another run.

    Not by the number alone: the journal may have more lines, or fewer.
    """
    wanted = events[number]
    left = sum(_same(one, wanted) for one in events[:number])

    def before(event: Event) -> None:
        nonlocal left
        if _same(event, wanted):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    return before


def _same(one: Event, other: Event) -> bool:
    return (one.what, one.path) == (other.what, other.path)


def prepared(subject: Subject, work: Path, setting: Setting) -> Path:
    """The output in an empty folder, where a bundle is if one is to be replaced."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if setting.force:
        shutil.copytree(subject.old, work / "out")
    return work / "out"


def recorded(subject: Subject, work: Path, setting: Setting) -> tuple[Node, list[Event]]:
    """The folder before a build, and all that the build asks for."""
    out = prepared(subject, work, setting)
    before, log = Node.read(work), EventLog(work)
    with log.recording():
        code = run(subject.arguments(out, setting.jobs, force=setting.force))
    if code:
        raise SystemExit(f"{subject.target}: an undisturbed build ends with {code}")
    return before, log.events


def what_is_wrong(subject: Subject, work: Path, setting: Setting, *, moved: bool) -> str:
    """What a crash left that it should not, and what running again makes of it.

    moved: a bundle that is finished is moved away before, as no second build would begin.
    """
    out, whole = work / "out", contents(subject.new)
    left, force = contents(out), setting.force
    wholes = [contents(subject.old), whole] if force else [{}, whole]
    if left and left not in wholes:
        return "the output is neither the old bundle nor the new one"
    # Between two renames it may be beside the output.
    if not any(contents(place) in wholes for place in (out, *work.glob("out.partial/*"))):
        return "neither the old bundle nor the new one is whole"
    if left == whole and not force:
        if moved:
            out.rename(work.with_name("moved"))
            shutil.rmtree(work.with_name("moved"))
        force = not moved
    code = ended(start(subject.arguments(out, setting.jobs, force=force)))
    if code:
        return f"the same command ends with {code}"
    if contents(out) != whole:
        return "the bytes differ"
    beside = sorted(path.name for path in work.iterdir() if path != out)
    return f"left over: {', '.join(beside)}" if beside else ""


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, by name; nothing where no folder is."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@dataclass
class Counts:
    """What came of trials of one kind."""

    trials: int = 0
    hits: int = 0
    wrong: tuple[str, ...] = ()

    def add(self, what: str, wrong: str, *, hit: bool = True) -> None:
        """Count one trial."""
        self.trials += 1
        self.hits += hit
        self.wrong += (f"{what}: {wrong}",) if wrong else ()


Trial = tuple[Subject, Path, Setting]


def kill_at_moments(trial: Trial, hits: int, drawn: random.Random) -> Counts:
    """So many kills at random shares of the time that a build takes; some may come too late."""
    subject, _, setting = trial
    counts, began = Counts(), time.monotonic()
    ended(start(subject.arguments(prepared(*trial), setting.jobs, force=setting.force)))
    seconds = time.monotonic() - began
    while counts.hits < hits and counts.trials < 4 * hits:
        out, share = prepared(*trial), drawn.random()
        child = start(subject.arguments(out, setting.jobs, force=setting.force))
        time.sleep(share * seconds)
        os.kill(child, signal.SIGKILL)
        hit = ended(child) == -signal.SIGKILL
        wrong = what_is_wrong(*trial, moved=bool(counts.trials % 2))
        counts.add(f"{share:.3f} of the time", wrong, hit=hit)
    return counts


def kill_at_events(
    trial: Trial, all_events: Sequence[Event], events: Sequence[tuple[int, Event]]
) -> Counts:
    """Kills just before some events."""
    subject, work, setting = trial
    counts = Counts()
    for number, event in events:
        out = prepared(*trial)
        log = EventLog(work, killed_before(all_events, number))
        child = start(subject.arguments(out, setting.jobs, force=setting.force), log)
        hit = ended(child) == -signal.SIGKILL
        wrong = what_is_wrong(*trial, moved=bool(number % 2))
        counts.add(f"before {number}, {event}", wrong, hit=hit)
    return counts


def lose_power(
    trial: Trial, before: Node, all_events: Sequence[Event], events: Sequence[tuple[int, Event]]
) -> Counts:
    """Power loss just before some events, with luck of several kinds."""
    _, work, _ = trial
    kinds, counts = every_luck(all_events), Counts()
    for number, event in events:
        drawn = random.Random(number)
        lucks = {name: kinds[name] for name in ("nothing", drawn.choice([*kinds]))}
        for kind, luck in {**lucks, "chance": chance(number)}.items():
            shutil.rmtree(work, ignore_errors=True)
            after_power_loss(before, work, all_events[:number], luck).write_to(work)
            wrong = what_is_wrong(*trial, moved=bool(number % 2))
            counts.add(f"before {number}, {event}, {kind}", wrong)
    return counts


def chosen(events: Sequence[Event], sample: int, drawn: random.Random) -> list[tuple[int, Event]]:
    """Events of a log to be tried: all but many alike, or a sample that has all kinds."""
    pairs = list(enumerate(events))
    rare = [pair for pair in pairs if pair[1].what != ALIKE or "journal" in pair[1].path.name]
    if not sample:
        return sorted({*rare, *pairs[::EVERY]})
    late = [pair for pair in rare if pair[0] >= last_part(events)]
    return sorted({*drawn.sample(rare, sample), *drawn.sample(late, sample)})


def last_part(events: Sequence[Event]) -> int:
    """Where in a log all rows are in the journal."""
    lines = [number for number, one in enumerate(events) if one.path.name == "journal"]
    return lines[-2]


def all_trials(
    subject: Subject, work: Path, sample: int, seed: int
) -> Iterator[tuple[str, Callable[[], Counts]]]:
    """All trials of a target: what each kind is, and what runs them."""
    # Journal lines as often as can be.
    journal.SAVE_SECONDS = 0
    for setting in (Setting(1), Setting(2), Setting(1, force=True), Setting(2, force=True)):
        drawn, trial = random.Random(f"{seed} {setting}"), (subject, work, setting)
        before, events = recorded(*trial)
        few = chosen(events, sample, drawn)
        if setting.force:
            # Up to there it is as without the other bundle.
            few = [pair for pair in few if pair[0] >= last_part(events)]
        else:
            moments = partial(kill_at_moments, trial, sample or MOMENTS, drawn)
            yield f"{setting}: killed at moments", moments
        yield f"{setting}: killed at events", partial(kill_at_events, trial, events, few)
        if setting.jobs == 2:
            lose = partial(lose_power, trial, before, events, few if sample else few[::2])
            yield f"{setting}: power lost", lose


def main() -> None:
    """Run the trials that the command line asks for; exit with 1 if one went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=0, help="so many events, not all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="only kinds with this in their name")
    parser.add_argument("--target", choices=[*POLICIES], action="append")
    asked = parser.parse_args()
    wrong = Counter[str]()
    print(f"{'target':17}{'':38}{'trials':>8}{'hits':>8}{'wrong':>8}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        for target in asked.target or POLICIES:
            subject, began = make_subject(place, target), time.monotonic()
            for kind, trials in all_trials(subject, place / "work", asked.sample, asked.seed):
                if asked.kind not in kind:
                    continue
                counts = trials()
                seconds, began = time.monotonic() - began, time.monotonic()
                figures = f"{counts.trials:8}{counts.hits:8}{len(counts.wrong):8}{seconds:9.1f}"
                print(f"{target:17}{kind:38}{figures}", flush=True)
                for example in counts.wrong[:10]:
                    print(f"  {example}")
                wrong["all"] += len(counts.wrong)
    sys.exit(1 if wrong["all"] else 0)


if __name__ == "__main__":
    main()
