"""One host's part of a store: looked at, sent, verified."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from dist_moe.engine.start.record import show_bytes
from dist_moe.parallel.remote import Commands, Outcome
from dist_moe.store.manifest import MANIFEST_NAME, Manifest
from dist_moe.store.parts import HostPart

_LINE_EVERY_S = 10.0
_NO_RSYNC, _NO_DIRECTORY, _NO_CHECKER = 90, 91, 92
_DAMAGED = 2  # exit code of dist-moe inspect

# Prints the free bytes, the manifest's SHA-256 if there is one, and the bytes of each file that is there.
_LOOK = f"""
directory=$1
shift
command -v rsync >/dev/null 2>&1 || exit {_NO_RSYNC}
mkdir -p "$directory" && [ -w "$directory" ] || exit {_NO_DIRECTORY}
echo "free $(df -Pk "$directory" | awk 'NR == 2 {{ print $4 }}')"
[ ! -f "$directory/{MANIFEST_NAME}" ] || echo "manifest $(sha256sum <"$directory/{MANIFEST_NAME}" | cut -c 1-64)"
for name; do
    [ ! -f "$directory/$name" ] || echo "file $(wc -c <"$directory/$name")"
done
"""
_VERIFY = f"""
for program in "$2" dist-moe; do
    if command -v "$program" >/dev/null 2>&1 && "$program" --version >/dev/null 2>&1; then
        exec "$program" inspect --verify "$1" >/dev/null
    fi
done
exit {_NO_CHECKER}
"""
_FAILURES = {
    _NO_RSYNC: "has no rsync: install it there (Debian: apt-get install rsync)",
    _NO_DIRECTORY: "cannot write {there}: make the directory there, or choose another one with --to",
    255: "cannot be reached: {errors}: `ssh {host} true` must work without a password",
}


@dataclass(frozen=True)
class Served:
    """How it went, as a line without the host's name."""

    served: bool
    line: str


class _NotServed(Exception):
    """Ends one host's service with a line."""


class Pusher:
    """Serves hosts, several at the same time; each by one call of `serve`."""

    def __init__(
        self,
        commands: Commands,
        directory: Path,
        there: str,
        manifest: Manifest,
        limits: Sequence[str] = (),
        force: bool = False,
    ) -> None:
        """Prepare.

        Args:
            commands: Reach the hosts.
            directory: The store here.
            there: Its absolute path on the hosts.
            manifest: Its manifest.
            limits: Options of rsync.
            force: Whether another store there is replaced.
        """
        self._commands = commands
        self._directory = directory
        self._there = there
        self._manifest = manifest
        self._limits = list(limits)
        self._force = force
        self._sum = hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest()
        self._program = str(Path(sys.executable).with_name("dist-moe"))

    def stop(self) -> None:
        """End what runs."""
        self._commands.stop()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._commands.stopped

    def describe(self, part: HostPart) -> str:
        """What a host is to have, in words."""
        numbers = ", ".join(map(str, part.shards))
        which = f"shard{'s' if len(part.shards) > 1 else ''} {numbers} of {self._manifest.nodes}"
        return f"{which}, {len(part.files) + 1} files, {show_bytes(part.total_bytes)}, to {self._there}"

    def command(self, part: HostPart) -> list[str]:
        """The command that sends the files, whose names it reads from stdin."""
        return self._commands.send_command(self._directory, part.host, self._there, self._limits)

    def serve(self, part: HostPart) -> Served:
        """Look, send, verify; what was damaged is sent once more."""
        try:
            self._look(part)
            started_s = time.monotonic()
            sent_bytes = self._send(part)
            took_s = time.monotonic() - started_s
            how = self._verify(part)
            if how is None:
                sent_bytes += self._send(part, "--checksum")
                how = self._verify(part)
        except _NotServed as error:
            return Served(False, f"error: {error}")
        if how is None:
            return Served(
                False,
                "error: what arrived differs from its checksums, twice: the disk or the memory of that host is faulty, "
                f"or the store here is damaged (dist-moe inspect --verify {self._directory})",
            )
        sent = f"{show_bytes(sent_bytes)} sent in {took_s:.0f} s" if sent_bytes >= 1 << 16 else "it was there"
        return Served(True, f"{self.describe(part)}: {sent}, {how}")

    def _look(self, part: HostPart) -> None:
        outcome = self._commands.script(part.host, _LOOK, self._there, *(file.name for file in part.files))
        self._require(part.host, outcome, "could not be looked at")
        facts = [line.split() for line in outcome.output.splitlines() if line]
        free_bytes = sum(int(fact[1]) << 10 for fact in facts if fact[0] == "free" and len(fact) == 2)
        present_bytes = sum(int(fact[1]) for fact in facts if fact[0] == "file")
        other = any(fact[0] == "manifest" and fact[1] != self._sum for fact in facts)
        if other and not self._force:
            raise _NotServed(f"another store stands in {self._there}: choose another directory with --to, or --force")
        missing_bytes = part.total_bytes - present_bytes
        if missing_bytes > free_bytes and not other:
            raise _NotServed(
                f"{self._there} has {show_bytes(free_bytes)} free, but {show_bytes(missing_bytes)} are to come: "
                "make room there"
            )

    def _send(self, part: HostPart, *options: str) -> int:
        """Send the files, the manifest last, so that a store with a manifest is whole; returns bytes."""
        names = [file.name for file in part.files]
        show = _Progress(part.host)
        total = 0
        for group, seen in ((names, show), ([MANIFEST_NAME], None)):
            outcome = self._commands.send(
                self._directory,
                part.host,
                self._there,
                group,
                [*self._limits, *options, "--stats", "--info=progress2"],
                seen,
            )
            self._require(part.host, outcome, f"rsync ended with code {outcome.code}")
            found = re.search(r"Total bytes sent: ([0-9,.]+)", outcome.output)
            total += int(re.sub(r"\D", "", found[1])) if found else 0
        return total

    def _verify(self, part: HostPart) -> str | None:
        """How the files were found to be right, or None if they are not."""
        outcome = self._commands.script(part.host, _VERIFY, self._there, self._program)
        if outcome.code == 0:
            return "verified by dist-moe there"
        if outcome.code == _DAMAGED:
            return None
        if outcome.code == 255:
            self._require(part.host, outcome, "")
        names = [file.name for file in part.files] + [MANIFEST_NAME]
        compared = self._commands.send(
            self._directory, part.host, self._there, names, ["--dry-run", "--checksum", "--out-format=differs %n"]
        )
        self._require(part.host, compared, f"rsync ended with code {compared.code} when it compared checksums")
        differ = "differs " in compared.output
        return None if differ else "compared by checksum (there is no dist-moe on that host's PATH yet)"

    def _require(self, host: str, outcome: Outcome, what: str) -> None:
        if outcome.code == 0:
            return
        errors = outcome.errors or "it said nothing"
        sentence = _FAILURES.get(outcome.code, f"{what}: {{errors}}")
        raise _NotServed(sentence.format(there=self._there, errors=errors, host=host))


class _Progress:
    """Says now and then how far rsync is."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._next_s = time.monotonic() + _LINE_EVERY_S

    def __call__(self, line: str) -> None:
        """Take a line of rsync's --info=progress2: bytes, percent, rate, time left."""
        found = re.match(r"\s*[0-9,.]+[KMG]?\s+([0-9]+%)\s+(\S+)\s+(\S+)", line)
        if found is None or time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _LINE_EVERY_S
        click.echo(f"{self._host}: {found[1]}, {found[2]}, {found[3]}", err=True)
