"""Reads a Chrome trace by the rules of Google's "Trace Event Format", and refuses what breaks one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Event:
    """A complete event with those that lie in it. Times are whole nanoseconds."""

    name: str
    category: str
    begin_ns: int
    end_ns: int
    args: dict[str, Any]
    children: list[Event] = field(default_factory=list)

    def named(self, name: str) -> list[Event]:
        """The children of that name."""
        return [child for child in self.children if child.name == name]


@dataclass(frozen=True)
class ChromeTrace:
    """Each process's name and its events, nested."""

    names: dict[int, str]
    events: dict[int, list[Event]]
    other: dict[str, Any]


def read_chrome_trace(path: Path) -> ChromeTrace:
    """Read a file and check it: kinds of events, the keys of each kind, their types, and that events nest."""
    found = json.loads(path.read_text())
    assert found["displayTimeUnit"] in ("ms", "ns")
    assert isinstance(found["traceEvents"], list)
    names: dict[int, str] = {}
    flat: dict[int, list[Event]] = {}
    for event in found["traceEvents"]:
        assert event["ph"] in ("M", "X"), event
        assert type(event["pid"]) is int, event
        assert type(event["tid"]) is int, event
        assert isinstance(event["name"], str), event
        assert event["name"], event
        assert isinstance(event["args"], dict), event
        if event["ph"] == "X":
            for key in ("ts", "dur"):  # microseconds, fractions allowed
                assert type(event[key]) in (int, float), event
                assert event[key] >= 0, event
            begin_ns = round(event["ts"] * 1000)
            made = Event(event["name"], event["cat"], begin_ns, begin_ns + round(event["dur"] * 1000), event["args"])
            flat.setdefault(event["pid"], []).append(made)
        elif event["name"] == "process_name":
            assert event["pid"] not in names
            names[event["pid"]] = event["args"]["name"]
        else:
            assert event["name"] in ("thread_name", "process_sort_index"), event
    assert flat.keys() <= names.keys()
    assert min(event.begin_ns for events in flat.values() for event in events) == 0
    return ChromeTrace(names, {pid: _nested(events) for pid, events in flat.items()}, found["otherData"])


def _nested(events: list[Event]) -> list[Event]:
    """Outer events with their children; events of one thread must lie in each other or apart."""
    outer: list[Event] = []
    around: list[Event] = []
    for event in sorted(events, key=lambda event: (event.begin_ns, -event.end_ns)):
        while around and around[-1].end_ns <= event.begin_ns:
            around.pop()
        if around:
            assert event.end_ns <= around[-1].end_ns, (around[-1], event)
            around[-1].children.append(event)
        else:
            outer.append(event)
        around.append(event)
    return outer
