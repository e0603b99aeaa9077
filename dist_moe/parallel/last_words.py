"""Time for the others to say that a rank was killed. Hydra else ends the job at once, naming nothing but a process id.

Hydra looks for dead ranks whenever something happens on its connections to one, and ends the job when a host's proxy,
with which that host's ranks die, has hung up. A shell of a few hundred kilobytes keeps copies of the connections open
that this rank has inherited, so that the next thing that happens is the line which names the rank (`watchdog.py`).
prterun and srun name the rank themselves.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from dist_moe.parallel.launcher import Launcher

# stdin ends without a word when the rank is killed.
_SCRIPT = "read -r word || sleep 0.5"
_GONE_WITHIN_S = 2.0


class LastWords:
    """Keeps Hydra's connections to this rank open for half a second after its death, unless `spare` is called."""

    def __init__(self, launcher: Launcher, environ: Mapping[str, str]) -> None:
        """Start the shell, under Hydra and beside other ranks; elsewhere do nothing.

        Args:
            launcher: What started this process.
            environ: The launcher's environment.
        """
        self._shell: subprocess.Popen[bytes] | None = None
        hydra_fd = environ.get("PMI_FD", "")
        if launcher.name != "mpich" or launcher.size < 2 or not hydra_fd.isdecimal():
            return
        with contextlib.suppress(OSError):
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT],
                stdin=subprocess.PIPE,
                pass_fds=_inherited(),
                start_new_session=True,  # Hydra kills a rank's whole process group
            )

    def spare(self) -> None:
        """This rank ends by itself."""
        if self._shell is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._shell.communicate(b"spared\n", _GONE_WITHIN_S)


def _inherited() -> tuple[int, ...]:
    """The open files that a started program would have too: what this process opened itself is not among them."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.get_inheritable(int(entry.name)):
                found.append(int(entry.name))
    return tuple(found)
