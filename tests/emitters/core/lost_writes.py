"""What a disk holds after power loss: what was synced, and what luck adds of the rest.

A log's events are made again, on files and folders of the mind. Bytes of a file are safe once
the file is synced, names once their folder is; a rename takes both names or none, and is safe
once either folder is synced. What is not safe may be there, or not, each event by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from event_log import Event

_CONTENT = ("write", "truncate")


@dataclass(eq=False)
class Node:
    """A file's bytes, or a folder's names."""

    content: bytearray | None = None
    names: dict[str, Node] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Node:
        """What is on the disk now."""
        if not path.is_dir():
            return cls(bytearray(path.read_bytes()))
        return cls(None, {entry.name: cls.read(entry) for entry in path.iterdir()})

    def write_to(self, path: Path) -> None:
        """Make it on the disk."""
        if self.content is not None:
            path.write_bytes(self.content)
            return
        path.mkdir(exist_ok=True)
        for name, node in self.names.items():
            node.write_to(path / name)

    def copy(self) -> Node:
        """Another one of the same content, all the way down."""
        content = None if self.content is None else bytearray(self.content)
        return Node(content, {name: node.copy() for name, node in self.names.items()})

    def files(self) -> dict[str, bytes]:
        """The bytes of every file, by name, those of subfolders as `folder/name`."""
        found: dict[str, bytes] = {}
        for name, node in self.names.items():
            if node.content is not None:
                found[name] = bytes(node.content)
            found |= {f"{name}/{inner}": held for inner, held in node.files().items()}
        return found

    def folders(self) -> set[str]:
        """The names of all folders in it."""
        within = {name: node for name, node in self.names.items() if node.content is None}
        deeper = {f"{name}/{one}" for name, node in within.items() for one in node.folders()}
        return {*within, *deeper}

    def at(self, path: Path) -> Node:
        """What is there by this path, seen from here. Raises: KeyError if nothing is."""
        node = self
        for name in path.parts:
            node = node.names[name]
        return node


# What a change that no sync has made safe becomes: itself, half of it, or nothing.
Luck = Callable[[Event], Event | None]


def nothing(event: Event) -> None:
    """All that is not safe is lost."""


def names_only(event: Event) -> Event | None:
    """Renames and the like reach the disk before contents do."""
    return None if event.what in _CONTENT else event


def contents_only(event: Event) -> Event | None:
    """Contents reach the disk before names do."""
    return event if event.what in _CONTENT else None


def everything(event: Event) -> Event:
    """Nothing is lost, as when a program is killed."""
    return event


def lost_for(name: str) -> Luck:
    """What was asked for one name is lost, all else is there."""
    return lambda event: None if name in _named(event) else event


def kept_for(name: str) -> Luck:
    """What was asked for one name is there, all else is lost."""
    return lambda event: event if name in _named(event) else None


def _named(event: Event) -> tuple[str, ...]:
    return event.path.name, event.target.name


def every_luck(events: Iterable[Event]) -> dict[str, Luck]:
    """All kinds of luck for a log, by what they are; but for chance."""
    kinds: dict[str, Luck] = {
        "nothing": nothing,
        "names only": names_only,
        "contents only": contents_only,
        "everything": everything,
    }
    for name in sorted({event.path.name for event in events}):
        kinds[f"all but {name}"] = lost_for(name)
        kinds[f"{name} alone"] = kept_for(name)
    return kinds


def chance(seed: int) -> Luck:
    """Each change by itself is there, or not; of a write perhaps the first half."""
    drawn = random.Random(seed)

    def luck(event: Event) -> Event | None:
        kind = drawn.random()
        if event.what == "write" and kind < 0.2:
            return event._replace(content=event.content[: len(event.content) // 2])
        return event if kind < 0.6 else None

    return luck


def after_power_loss(before: Node, root: Path, events: Sequence[Event], luck: Luck) -> Node:
    """The folder `root` as the disk may have it after these events, and no later one.

    before: as it was before the first one, all of which is safe.
    """
    # Every file and folder twice: as the program sees it, and as the disk has it.
    seen, disk = before.copy(), before.copy()
    nodes = dict(_pairs(seen, disk))
    steps = [(event, *_step(seen, root, event, nodes)) for event in events]
    safe: set[Node] = set()
    kept: list[tuple[Event, Remake]] = []
    for event, touched, remake in reversed(steps):
        if event.what == "sync":
            safe.update(touched)
            continue
        left = event if safe.intersection(touched) else luck(event)
        if left is not None:
            kept.append((left, remake))
    for event, remake in reversed(kept):
        remake(event)
    return disk


def _pairs(one: Node, other: Node) -> Iterator[tuple[Node, Node]]:
    """All nodes of two equal trees, side by side."""
    yield one, other
    for name, node in one.names.items():
        yield from _pairs(node, other.names[name])


Remake = Callable[[Event], None]


def _step(
    seen: Node, root: Path, event: Event, nodes: dict[Node, Node]
) -> tuple[list[Node], Remake]:
    """Make an event on what the program sees.

    Returns the nodes of which one has to be synced for it to be safe, and what makes it on the
    disk's nodes.
    """
    path = event.path.relative_to(root)
    if event.what in (*_CONTENT, "sync"):
        node = seen.at(path)
        _change(node, event)
        return [node], partial(_change, nodes[node])
    folder, name = seen.at(path.parent), path.name
    if event.what in ("create", "mkdir"):
        made, twin = (Node(bytearray() if event.what == "create" else None) for _ in range(2))
        nodes[made], folder.names[name] = twin, made
        return [folder], partial(_put, nodes[folder], name, twin)
    if event.what == "rename":
        onto = event.target.relative_to(root)
        place, moved = seen.at(onto.parent), folder.names.pop(name)
        place.names[onto.name] = moved
        places = (nodes[folder], name), (nodes[place], onto.name)
        return [folder, place], partial(_move, *places, nodes[moved])
    gone = folder.names.pop(name)
    return [folder], partial(_take, nodes[folder], name, nodes[gone])


def _change(node: Node, event: Event) -> None:
    """A write or a truncate of a file."""
    if node.content is None or event.what == "sync":
        return
    held = node.content
    if event.what == "truncate":
        held[:] = held[: event.start] + bytes(max(0, event.start - len(held)))
        return
    held.extend(bytes(max(0, event.start - len(held))))
    held[event.start : event.start + len(event.content)] = event.content


def _put(folder: Node, name: str, node: Node, _: Event) -> None:
    folder.names[name] = node


def _take(folder: Node, name: str, node: Node, _: Event) -> None:
    # Where an earlier change was lost, the name may be another file's, or nobody's.
    if folder.names.get(name) is node:
        del folder.names[name]


def _move(source: tuple[Node, str], target: tuple[Node, str], node: Node, event: Event) -> None:
    _take(*source, node, event)
    _put(*target, node, event)
