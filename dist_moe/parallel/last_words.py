"""A killed rank still has its line. Hydra ends the whole job within a millisecond, and names nothing but a process id.

A shell of a few hundred kilobytes keeps a copy of the rank's connection to Hydra, so that Hydra learns of the death
only after the line is out. prterun and srun name the rank themselves.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Mapping

from dist_moe.parallel.launcher import Launcher

# stdin ends without a word when the rank is killed. If the launcher itself killed it, nobody reads stderr any more.
_SCRIPT = 'read -r word || { sleep 0.2; echo "$0" >&2 && sleep 0.3; }'
_GONE_WITHIN_S = 2.0


class LastWords:
    """Says that this rank has died, unless `spare` was called before."""

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
        line = death_line(f"rank {launcher.rank} on {socket.gethostname()}")
        with contextlib.suppress(OSError):
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, f"dist-moe: error: {line}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(int(hydra_fd),),
                start_new_session=True,  # Hydra kills a rank's whole process group
            )

    def spare(self) -> None:
        """This rank ends by itself: nothing is to be said."""
        if self._shell is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._shell.communicate(b"spared\n", _GONE_WITHIN_S)


def death_line(who: str) -> str:
    """The line that a rank's death gets."""
    return f"{who} has died (killed, perhaps for want of memory, or crashed)"
