"""A Slurm of one node: its own munged, slurmctld and slurmd in a directory, from Debian's slurm-wlm and libpmix2."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

import pytest

_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel")
_ADMIN_DIRECTORIES = ("/usr/sbin", "/usr/local/sbin", "/sbin")
_UP_WITHIN_S = 30.0


def why_not() -> str:
    """Why there can be no Slurm here; empty if there can."""
    missing = [name for name in _PROGRAMS if _which(name) is None]
    if missing:
        return f"no {', '.join(missing)} (Debian: slurm-wlm, munge, libpmix2)"
    return "" if os.geteuid() == 0 else "slurmd wants to be root"


class Slurm:
    """`with Slurm(directory) as slurm:` its commands run with `slurm.environ`; nothing of it survives the block."""

    def __init__(self, directory: Path, cores: int = 2) -> None:
        self._directory = directory
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environ = {"SLURM_CONF": str(directory / "slurm.conf")}
        for name in ("state", "spool", "munge"):
            (directory / name).mkdir(parents=True)
            (directory / name).chmod(0o755)
        (directory / "munge.key").write_bytes(secrets.token_bytes(128))
        (directory / "munge.key").chmod(0o400)
        (directory / "slurm.conf").write_text(self._configuration(cores), encoding="utf-8")

    def __enter__(self) -> Slurm:
        self._start("munged", "--foreground", "--force", *self._munge_options())
        time.sleep(0.3)
        self._start("slurmctld", "-D", "-c")
        self._start("slurmd", "-D")
        until_s = time.monotonic() + _UP_WITHIN_S
        while "idle" not in self.run("sinfo", "-h", "-o", "%T", check=False):
            if time.monotonic() > until_s:
                self.__exit__(None, None, None)
                pytest.fail(f"Slurm is not up: {self.logs()}")
            time.sleep(0.2)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.run("scancel", "--state=RUNNING", check=False)
        self.run("scancel", "--state=PENDING", check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(10)

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of Slurm prints."""
        environ = {**os.environ, **self.environ}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def state(self, job: str) -> str:
        """A job's state: PENDING, RUNNING, COMPLETED, ..."""
        shown = self.run("scontrol", "show", "job", job, "-o")
        return next(word.removeprefix("JobState=") for word in shown.split() if word.startswith("JobState="))

    def wait_for_state(self, job: str, *states: str, timeout_s: float = 90) -> str:
        """Wait until a job is in one of these states; fail if it does not come there."""
        until_s = time.monotonic() + timeout_s
        while (state := self.state(job)) not in states:
            if time.monotonic() > until_s:
                pytest.fail(f"job {job} is {state}: {self.logs()}")
            time.sleep(0.1)
        return state

    def logs(self) -> str:
        """The ends of the daemons' logs, for messages."""
        texts = [path.read_text(errors="replace")[-2000:] for path in sorted(self._directory.glob("*.log"))]
        return "\n---\n".join(texts)

    def _start(self, name: str, *options: str) -> None:
        program = _which(name)
        assert program is not None
        with (self._directory / f"{name}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    [program, *options],
                    env={**os.environ, **self.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._directory,
                )
            )

    def _munge_options(self) -> list[str]:
        munge = self._directory / "munge"
        return [
            f"--key-file={self._directory / 'munge.key'}",
            f"--socket={munge / 'socket'}",
            f"--pid-file={munge / 'pid'}",
            f"--seed-file={munge / 'seed'}",
        ]

    def _configuration(self, cores: int) -> str:
        host, here = socket.gethostname().split(".")[0], self._directory
        # MPICH names its memory in /dev/shm after the job: what a killed one of the same number left is in the way.
        first_job = 1000 + secrets.randbelow(1_000_000)
        return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={here / "munge" / "socket"}
SlurmUser=root
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
StateSaveLocation={here / "state"}
SlurmdSpoolDir={here / "spool"}
SlurmctldPidFile={here / "slurmctld.pid"}
SlurmdPidFile={here / "slurmd.pid"}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
FirstJobId={first_job}
SchedulerParameters=sched_interval=1,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *_ADMIN_DIRECTORIES]))


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
