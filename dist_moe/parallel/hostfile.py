"""Host files, in the two dialects of `mpirun`: MPICH's `node1:4` and Open MPI's `node1 slots=4`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dist_moe.errors import UsageError

_HYDRA = re.compile(r"(?P<host>[^\s:]+):(?P<ranks>\d+)(\s+\S+=\S+)*")
_PRTE = re.compile(r"(?P<host>[^\s:]+)(\s+slots\s*=\s*(?P<ranks>\d+)|\s+max[_-]slots\s*=\s*\d+)+")
_BARE = re.compile(r"(?P<host>[^\s:=]+)")


@dataclass(frozen=True)
class HostEntry:
    """One line: the host, and its ranks (None where the line does not say)."""

    host: str
    ranks: int | None
    line: int


@dataclass(frozen=True)
class Hostfile:
    """A parsed file; `dialect` is "mpich", "openmpi", or None where every line is a bare name."""

    path: Path
    entries: tuple[HostEntry, ...]
    dialect: str | None

    @property
    def ranks(self) -> int:
        """All ranks; a host without a number counts once."""
        return sum(entry.ranks or 1 for entry in self.entries)

    def command(self, family: str) -> str:
        """The beginning of a command that starts a rank on every place of the file."""
        return f"mpirun {'--hostfile' if family == 'openmpi' else '-f'} {self.path} -n {self.ranks}"


def read_hostfile(path: Path) -> Hostfile:
    """Parse a host file of either dialect.

    Raises:
        UsageError: It cannot be read, names no host, has a line of neither dialect, or lines of both.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UsageError(f"--hostfile: {path} cannot be read: {reason}") from error
    entries: list[HostEntry] = []
    dialects: dict[str | None, int] = {}
    for number, raw in enumerate(lines, 1):
        text = raw.partition("#")[0].strip()
        if not text:
            continue
        dialect, match = _match(text)
        if match is None:
            raise UsageError(
                f"--hostfile: {path} line {number}: expected `host`, `host:ranks` (MPICH) or `host slots=ranks` "
                f"(Open MPI), found {text!r}"
            )
        ranks = match.groupdict().get("ranks")
        entries.append(HostEntry(match["host"], int(ranks) if ranks else None, number))
        dialects.setdefault(dialect, number)
    dialects.pop(None, None)
    if len(dialects) > 1:
        raise UsageError(
            f"--hostfile: {path} mixes two dialects: line {dialects['mpich']} is MPICH's, line {dialects['openmpi']} "
            "Open MPI's; write all lines as your mpirun wants them"
        )
    if not entries:
        raise UsageError(f"--hostfile: {path} names no host: write one per line")
    return Hostfile(path, tuple(entries), next(iter(dialects), None))


def _match(text: str) -> tuple[str | None, re.Match[str] | None]:
    for dialect, pattern in (("mpich", _HYDRA), ("openmpi", _PRTE), (None, _BARE)):
        if match := pattern.fullmatch(text):
            return dialect, match
    return None, None
