"""Real hosts on one machine: network namespaces joined by a switch, each with a name, an address and a disk of its own.

    with Cluster(2, rate="1gbit") as cluster:
        store = cluster.give(made, {0: [1], 1: [2]})          # host 0 gets shard 1, host 1 shard 2
        done = cluster.mpirun((1, 2), "dist-moe", "run", "-m", store)   # one rank on host 0, two on host 1

A host's disk and its /dev/shm stand at the same paths on every host, as they would in a rack, with other contents.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil
import pytest

from helpers import launching
from helpers.jobs import Job, describe

INTERFACE = "eth0"
MPIRUN_AT = 0
_NETWORK = "10.77.0"
# Namespaces, directories and shared memory of one cluster begin so: whose it is, and which of that process's.
_NAME = re.compile(r"moe-hosts-([0-9]+)-[a-z]-")
_SHARED_MEMORY = Path("/dev/shm")
_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname")
_letters = itertools.cycle("abcdefghijklmnopqrstuvwxyz")

# HOST COMMAND...: the command sees its host's network, name, disk and shared memory. The outer namespace first, because
# mpirun, which starts what runs on the other hosts, is on a host itself.
_ENTER = """#!/bin/sh
host=$1
shift
exec nsenter --mount=/proc/{pid}/ns/mnt --wdns="$PWD" ip netns exec {name}"$host" unshare --uts --mount sh -ec '
    hostname "$1"
    mount --bind {home}/hosts /etc/hosts
    mount --bind {home}/disks/"$1" {home}/disk
    mount --bind {shared}/"$1" /dev/shm
    shift
    exec "$@"' sh "$host" "$@"
"""
# What a launcher takes for ssh: the command is a shell's, and of the environment only what a login has.
_SSH = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1
shift
exec env -i PATH="$PATH" HOME="$HOME" {home}/enter "$host" sh -c "$*"
"""


class Cluster:
    """`with Cluster(hosts) as cluster:` makes the hosts; at the end nothing of them is left, also not of a dead run."""

    def __init__(self, hosts: int, rate: str | None = None) -> None:
        """Make the hosts.

        Args:
            hosts: How many; they are called host0, host1, ...
            rate: Of every link in each direction, as `tc` writes it ("1gbit"); None: as fast as it goes.
        """
        skip_unless_allowed()
        remove_leftovers()
        self.hosts = tuple(f"host{number}" for number in range(hosts))
        self.addresses = tuple(f"{_NETWORK}.{number + 1}" for number in range(hosts))
        self._name = f"moe-hosts-{os.getpid()}-{next(_letters)}-"
        self.home = Path(tempfile.mkdtemp(prefix=self._name))
        self.shared_memory = _SHARED_MEMORY / self._name
        # Where a host sees its own disk.
        self.disk = self.home / "disk"
        try:
            self._write_files()
            self._build(rate)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kill what still runs on the hosts and remove them."""
        _remove(self._name)

    def give(self, store: Path, shards: Mapping[int, Sequence[int]], link: bool = False) -> Path:
        """Give each host its part of a store: some shards (from 1) and all that is no shard.

        Args:
            store: A complete store.
            shards: The numbers of the shards by host; a host that is not named gets none.
            link: Do not copy (large stores): hard links.

        Returns:
            The store's path on every host.
        """
        for number, host in enumerate(self.hosts):
            to = self.home / "disks" / host / store.name
            shutil.rmtree(to, ignore_errors=True)
            to.mkdir()
            wanted = {f"{shard:05}" for shard in shards.get(number, ())}
            for file in sorted(path for path in store.iterdir() if path.is_file()):
                shard = re.match(r"shard-(\d+)-of-", file.name)
                if shard is None or shard[1] in wanted:
                    (os.link if link else shutil.copyfile)(file, to / file.name)
        return self.disk / store.name

    def disk_of(self, host: int) -> Path:
        """A host's disk, seen from outside."""
        return self.home / "disks" / self.hosts[host]

    def on(self, host: int, *command: str | Path) -> tuple[str, ...]:
        """The command line that runs a command on a host."""
        return (str(self.home / "enter"), self.hosts[host], *map(str, command))

    def run(
        self, host: int, *command: str | Path, env: Mapping[str, str] | None = None, timeout_s: float = 60
    ) -> launching.Finished:
        """Run a command on one host, without a launcher."""
        return launching.run(*self.on(host, *command), env=self.environment(env), timeout_s=timeout_s)

    def mpirun(
        self,
        ranks: Sequence[int],
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 120,
        at: int = MPIRUN_AT,
    ) -> launching.Finished:
        """Run a command on so many ranks of each host; mpirun itself runs on host `at`."""
        words = self.mpirun_words(ranks, env, at)
        return launching.run(*words, *map(str, command), env=self.environment(env), timeout_s=timeout_s)

    def start(self, ranks: Sequence[int], *command: str | Path, env: Mapping[str, str] | None = None) -> HostsJob:
        """A job that goes on while the test does something to it: `with cluster.start((1, 1), ...) as job:`."""
        return HostsJob(self, ranks, *map(str, command), env=env)

    def mpirun_words(
        self, ranks: Sequence[int], env: Mapping[str, str] | None = None, at: int = MPIRUN_AT
    ) -> tuple[str, ...]:
        """The beginning of a command line: mpirun with its options, on host `at`."""
        words = ["-n", str(sum(ranks))]
        if launching.flavour() == "mpich":
            words += ["-launcher", "ssh", "-launcher-exec", str(self.ssh), "-iface", INTERFACE]
            words += ["-f", str(self.hostfile(ranks))]
        else:
            words += ["--hostfile", str(self.hostfile(ranks)), "--prtemca", "plm_ssh_agent", str(self.ssh)]
            # By default a host that may be oversubscribed takes all ranks; and unlike Hydra, prterun passes on nothing
            # that it is not told to.
            words += ["--map-by", "slot:oversubscribe"]
            for name in sorted({*self.environment(env)} | {"PYTHONPATH", "PATH"}):
                words += ["-x", name]
        return self.on(at, launching.mpirun_path(), *words)

    def launcher_variables(self) -> dict[str, str]:
        """What lets a mpirun that somebody else starts find its way to the hosts."""
        if launching.flavour() == "mpich":
            return {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(self.ssh), "HYDRA_IFACE": INTERFACE}
        return {"PRTE_MCA_plm_ssh_agent": str(self.ssh), "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe"}

    @property
    def ssh(self) -> Path:
        """What launchers call instead of ssh."""
        return self.home / "ssh"

    def hostfile(self, ranks: Sequence[int]) -> Path:
        """A host file with so many ranks on each host, in this mpirun's dialect; hosts without ranks are left out."""
        text = ":{}" if launching.flavour() == "mpich" else " slots={}"
        lines = [host + text.format(count) for host, count in zip(self.hosts, ranks, strict=True) if count]
        path = self.home / ("hosts-" + "-".join(map(str, ranks)))
        path.write_text("\n".join(lines) + "\n", encoding="ascii")
        return path

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a job needs on such hosts: TCP between ranks, a cache per host, gentle waiting; and `env` on top."""
        made = {
            "UCX_TLS": "tcp,self",
            "UCX_NET_DEVICES": INTERFACE,
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_btl": "tcp,self",
            "OMPI_MCA_btl_tcp_if_include": INTERFACE,
            "DIST_MOE_CACHE": str(self.disk / "cache"),
        }
        if len(self.hosts) > len(os.sched_getaffinity(0)):
            made["DIST_MOE_YIELD"] = "1"
        return made | dict(env or {})

    def cut(self, host: int) -> None:
        """Pull a host's cable."""
        self._ip("netns", "exec", self._switch, "ip", "link", "set", self.hosts[host], "down")

    def mend(self, host: int) -> None:
        """Put the cable back."""
        self._ip("netns", "exec", self._switch, "ip", "link", "set", self.hosts[host], "up")

    def processes(self, host: int) -> list[psutil.Process]:
        """What runs on a host."""
        return _processes(self._name + self.hosts[host])

    def received_bytes(self, host: int) -> int:
        """What has come over a host's cable so far, with all headers."""
        done = _run("ip", "-netns", self._name + self.hosts[host], "-s", "-j", "link", "show", INTERFACE)
        return int(json.loads(done.stdout)[0]["stats64"]["rx"]["bytes"])

    def left(self, within_s: float = 5.0) -> list[str]:
        """What is still on the hosts after so many seconds, in words: processes and shared memory."""
        until_s = time.monotonic() + within_s
        while True:
            found = []
            for number, host in enumerate(self.hosts):
                found += [f"{host}: {describe(process)}" for process in self.processes(number)]
                found += [str(path) for path in (self.shared_memory / host).iterdir()]
            if not found or time.monotonic() > until_s:
                return found
            time.sleep(0.05)

    @property
    def _switch(self) -> str:
        return self._name + "switch"

    def _write_files(self) -> None:
        own = zip(self.addresses, self.hosts, strict=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {host}" for address, host in own)]
        (self.home / "hosts").write_text("\n".join(lines) + "\n", encoding="ascii")
        self.disk.mkdir()
        self.shared_memory.mkdir()
        for host in self.hosts:
            (self.home / "disks" / host).mkdir(parents=True)
            (self.shared_memory / host).mkdir()
        names = {"pid": os.getpid(), "name": self._name, "home": self.home, "shared": self.shared_memory}
        for file, text in (("enter", _ENTER), ("ssh", _SSH)):
            path = self.home / file
            path.write_text(text.format(**names), encoding="ascii")
            path.chmod(0o755)

    def _build(self, rate: str | None) -> None:
        self._ip("netns", "add", self._switch)
        at_switch = ("netns", "exec", self._switch, "ip")
        self._ip(*at_switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        self._ip(*at_switch, "link", "set", "bridge", "up")
        for host, address in zip(self.hosts, self.addresses, strict=True):
            name = self._name + host
            self._ip("netns", "add", name)
            self._ip(*at_switch, "link", "add", host, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            self._ip(*at_switch, "link", "set", host, "master", "bridge", "up")
            at_host = ("netns", "exec", name, "ip")
            self._ip(*at_host, "link", "set", "lo", "up")
            self._ip(*at_host, "address", "add", f"{address}/24", "dev", INTERFACE)
            self._ip(*at_host, "link", "set", INTERFACE, "up")
            if rate is not None:
                self._shape(self._switch, host, rate)
                self._shape(name, INTERFACE, rate)

    def _shape(self, namespace: str, device: str, rate: str) -> None:
        # A larger burst would let a small message through at once.
        bucket = ("rate", rate, "burst", "16kb", "latency", "50ms")
        self._ip("netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, "root", "tbf", *bucket)

    def _ip(self, *words: str) -> None:
        done = _run("ip", *words)
        assert done.returncode == 0, f"ip {shlex.join(words)}: {done.stderr}"


class HostsJob(Job):
    """A job over several hosts; what it leaves on any of them counts."""

    def __init__(
        self, cluster: Cluster, ranks: Sequence[int], *command: str, env: Mapping[str, str] | None = None
    ) -> None:
        """Start it."""
        self._cluster = cluster
        self._before = set(cluster.left(0.0))
        launch = cluster.mpirun_words(ranks, env)
        super().__init__(sum(ranks), *command, env=cluster.environment(env), launch=launch)

    def _left(self) -> tuple[str, ...]:
        return (*super()._left(), *sorted(set(self._cluster.left(0.0)) - self._before))

    def _processes(self) -> list[psutil.Process]:
        found = {process.pid: process for process in super()._processes()}
        for host in range(len(self._cluster.hosts)):
            found |= {process.pid: process for process in self._cluster.processes(host)}
        return [*found.values()]


@functools.cache
def obstacle() -> str:
    """Why there can be no such hosts here; "" if there can."""
    if os.geteuid() != 0:
        return "hosts are network namespaces, which only root may make"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"hosts are network namespaces, and {', '.join(missing)} is missing (Debian: iproute2, util-linux)"
    name = f"moe-hosts-{os.getpid()}-p-robe"
    done = _run("ip", "netns", "add", name)
    if done.returncode == 0:
        for words in (
            ("unshare", "--uts", "--mount", "hostname", "probe"),
            ("ip", "link", "add", "bridge", "type", "bridge"),
            ("ip", "link", "add", "one", "type", "veth", "peer", "name", "other"),
        ):
            done = done if done.returncode else _run("ip", "netns", "exec", name, *words)
        _run("ip", "netns", "delete", name)
    return f"network namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else ""


def skip_unless_allowed() -> None:
    """Skip the test, with one clear word, where there can be no such hosts."""
    if reason := obstacle():
        pytest.skip(reason)


def remove_leftovers() -> None:
    """Remove the hosts of test runs that died."""
    names = {line.split()[0] for line in _run("ip", "netns", "list").stdout.splitlines() if line}
    names |= {path.name for path in [*_SHARED_MEMORY.iterdir(), *Path(tempfile.gettempdir()).iterdir()]}
    clusters = {match[0]: int(match[1]) for name in names if (match := _NAME.match(name))}
    for cluster, pid in clusters.items():
        if not psutil.pid_exists(pid):
            _remove(cluster)


def _remove(name: str) -> None:
    """Everything of a cluster, whose processes are killed first."""
    spaces = [line.split()[0] for line in _run("ip", "netns", "list").stdout.splitlines() if line.startswith(name)]
    for space in spaces:
        for process in _processes(space):
            process.send_signal(signal.SIGKILL)
    for space in spaces:
        _run("ip", "netns", "delete", space)
    for directory in (_SHARED_MEMORY / name, *Path(tempfile.gettempdir()).glob(f"{name}*")):
        shutil.rmtree(directory, ignore_errors=True)


def _processes(namespace: str) -> list[psutil.Process]:
    found = []
    for pid in _run("ip", "netns", "pids", namespace).stdout.split():
        try:
            process = psutil.Process(int(pid))
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
