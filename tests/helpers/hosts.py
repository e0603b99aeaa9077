"""Hosts that are directories: an `ssh` that runs its command where the host's own directory stands at a shared path."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

# Each command gets its own view of the file system, in which `there` is the host's directory.
_SSH = """#!/bin/sh
host=$1
shift
echo "$host" >>{log}
if [ ! -d "{hosts}/$host" ]; then
    echo "ssh: connect to host $host port 22: No route to host" >&2
    exit 255
fi
export PATH="{hosts}/$host.bin:$PATH"
exec unshare --map-root-user --mount sh -c 'mount --bind "$0" "$1" && shift && exec sh -c "$*"' \\
    "{hosts}/$host" "{there}" "$@"
"""


def why_not() -> str:
    """Why there can be no such hosts here; empty if there can."""
    missing = [name for name in ("rsync", "unshare") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "namespaces are not allowed here"


class Hosts:
    """Some hosts; `ssh` reaches them, and what stands in `there` on host h is in `directory(h)`."""

    def __init__(self, root: Path, *names: str) -> None:
        self._root = root / "hosts"
        self._log = root / "reached"
        self.there = root / "there"
        self.there.mkdir()
        for name in names:
            self.directory(name).mkdir(parents=True)
            (self._root / f"{name}.bin").mkdir()
        script = root / "ssh"
        script.write_text(_SSH.format(hosts=self._root, there=self.there, log=self._log))
        script.chmod(0o755)
        self.ssh = str(script)

    def directory(self, name: str) -> Path:
        """The host's files."""
        return self._root / name

    def install(self, name: str, program: str, text: str) -> None:
        """Give a host a program."""
        path = self._root / f"{name}.bin" / program
        path.write_text(text)
        path.chmod(0o755)

    def reached(self) -> list[str]:
        """The hosts that were reached, in their order."""
        return self._log.read_text().split() if self._log.exists() else []
