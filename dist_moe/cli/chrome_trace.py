"""A timeline as a Chrome trace: JSON that ui.perfetto.dev and chrome://tracing show, one process per rank.

Source of the format: Google's "Trace Event Format": complete events (ph "X") with ts and dur in microseconds, nested by
time within a pid and tid, and metadata events (ph "M") that name the processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_moe.engine.watch.timeline import Span, Timeline
from dist_moe.files import NewFile

_THREAD = 0
_EVENTS_PER_WRITE = 1000


def write_chrome_trace(path: Path, timeline: Timeline, hosts: Sequence[str]) -> None:
    """Write a timeline; the file is whole or absent.

    Args:
        path: Where to.
        timeline: A finished one.
        hosts: Host of each rank.

    Raises:
        UsageError: The file cannot be written.
    """
    other = {"steps": len(timeline), "dropped_steps": timeline.dropped_steps}
    with NewFile(path) as file:
        file.write(b'{"displayTimeUnit": "ms", "otherData": ' + _json(other) + b', "traceEvents": [\n')
        lines: list[bytes] = []
        for number, event in enumerate(_events(timeline, hosts)):
            lines.append((b",\n" if number else b"") + _json(event))
            if len(lines) == _EVENTS_PER_WRITE:
                file.write(b"".join(lines))
                lines = []
        file.write(b"".join(lines) + b"\n]}\n")
        file.commit()


def dropped_steps_line(path: Path, timeline: Timeline) -> str:
    """What to say when the timeline is not whole."""
    return (
        f"--trace {path}: the run was too long for one picture: it has the last {len(timeline)} steps, "
        f"{timeline.dropped_steps} earlier ones are left out"
    )


def _events(timeline: Timeline, hosts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for rank, host in enumerate(hosts):
        yield {
            "ph": "M",
            "name": "process_name",
            "pid": rank,
            "tid": _THREAD,
            "args": {"name": f"rank {rank} on {host}"},
        }
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": _THREAD, "args": {"sort_index": rank}}
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": _THREAD, "args": {"name": "steps"}}
    zero_ns = timeline.begin_ns
    for span in timeline.spans():
        yield _event(span, zero_ns)


def _event(span: Span, zero_ns: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.category,
        "ts": (span.begin_ns - zero_ns) / 1000,
        "dur": (span.end_ns - span.begin_ns) / 1000,
        "pid": span.rank,
        "tid": _THREAD,
        "args": dict(span.facts),
    }


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
