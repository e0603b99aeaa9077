"""dist-moe push: each host its part, resumed and verified, with hosts that are directories."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dist_moe.cli.push import push
from dist_moe.errors import EnvironmentMismatch, StoreError, UsageError
from dist_moe.store.manifest import read_manifest
from dist_moe.store.parts import host_parts
from helpers import launching
from helpers.hosts import Hosts, why_not

needs_hosts = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in two shards."""
    directory = tmp_path_factory.mktemp("push") / "demo-f32-2"
    done = launching.run(
        sys.executable, "-m", "dist_moe", "shard", "--nodes", "2", "--quant", "f32", "-o", str(directory)
    )
    assert done.code == 0, done.output
    return directory


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path, "node1", "node2")


def run_push(hosts: Hosts | None, *arguments: object) -> Result:
    reach = [] if hosts is None else ["--ssh", hosts.ssh, "--to", str(hosts.there)]
    return CliRunner().invoke(push, [*reach, *map(str, arguments)])


def shards(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("shard-*"))


@needs_hosts
def test_each_host_gets_its_shard_and_what_every_node_needs(hosts: Hosts, store: Path) -> None:
    result = run_push(hosts, store, "--hosts", "node1,node2")
    assert result.exit_code == 0, result.output
    for number in (1, 2):
        there = hosts.directory(f"node{number}")
        assert shards(there) == [f"shard-0000{number}-of-00002.safetensors"]
        for path in store.iterdir():
            if not path.name.startswith("shard-"):
                assert (there / path.name).read_bytes() == path.read_bytes()
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"node{number}: ")]
        assert f"shard {number} of 2" in line
        assert "verified by dist-moe" in line or "compared by checksum" in line
    again = run_push(hosts, store, "--hosts", "node1,node2")
    assert again.exit_code == 0
    assert again.stdout.count("it was there") == 2


@needs_hosts
def test_a_part_of_a_file_is_continued(hosts: Hosts, store: Path) -> None:
    name = "shard-00001-of-00002.safetensors"
    whole = (store / name).read_bytes()
    partial = hosts.directory("node1") / ".partial"
    partial.mkdir()
    (partial / name).write_bytes(whole[: len(whole) * 9 // 10])
    before = {path.name for path in store.iterdir()}
    result = run_push(hosts, store, "--hosts", "node1", "--assign", "node1=all")
    assert result.exit_code == 0, result.output
    assert (hosts.directory("node1") / name).read_bytes() == whole
    assert not partial.exists()
    sent = float(result.stdout.split(" MB sent")[0].split()[-1])
    total = sum((store / other).stat().st_size for other in before) / 1e6
    assert sent < total - 0.5 * len(whole) / 1e6


@needs_hosts
def test_control_c_ends_it_with_one_line_and_the_next_one_goes_on(hosts: Hosts, store: Path) -> None:
    command = [sys.executable, "-m", "dist_moe", "push", str(store), "--hosts", "node1", "--assign", "all"]
    command += ["--ssh", hosts.ssh, "--to", str(hosts.there)]
    process = subprocess.Popen(
        [*command, "--bwlimit", "300K"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=launching.child_environment(),
        start_new_session=True,
    )
    until_s = time.monotonic() + 60
    while not list(hosts.directory("node1").glob(".*shard-*")) and time.monotonic() < until_s:
        time.sleep(0.02)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr == "dist-moe: error: interrupted; repeat the same command to continue where it stopped\n"
    assert not stdout
    done = launching.run(*command)
    assert done.code == 0, done.output
    assert len(shards(hosts.directory("node1"))) == 2


@needs_hosts
def test_damage_is_found_and_sent_again(hosts: Hosts, store: Path) -> None:
    """A flipped bit leaves size and time as they were: rsync alone does not look at it again."""
    assert run_push(hosts, store, "--hosts", "node1", "--assign", "all").exit_code == 0
    path = hosts.directory("node1") / "shard-00002-of-00002.safetensors"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run_push(hosts, store, "--hosts", "node1", "--assign", "all").exit_code == 0
    assert path.read_bytes() == (store / path.name).read_bytes()


@needs_hosts
def test_without_dist_moe_there_checksums_are_compared(
    hosts: Hosts, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    hosts.install("node1", "dist-moe", "#!/bin/sh\nexit 1\n")  # as an installation for another Python
    result = run_push(hosts, store, "--hosts", "node1", "--assign", "all")
    assert "compared by checksum (there is no dist-moe on that host's PATH yet)" in result.stdout


@needs_hosts
def test_the_hosts_own_dist_moe_verifies(hosts: Hosts, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    program = f'#!/bin/sh\n[ "$1" = --version ] || echo "$@" >{hosts.directory("node1")}/asked\n'
    hosts.install("node1", "dist-moe", program)
    result = run_push(hosts, store, "--hosts", "node1", "--assign", "all")
    assert "verified by dist-moe there" in result.stdout
    assert (hosts.directory("node1") / "asked").read_text() == f"inspect --verify {hosts.there}\n"


@needs_hosts
def test_one_host_that_is_down_does_not_stop_the_others(hosts: Hosts, store: Path) -> None:
    result = run_push(hosts, store, "--hosts", "node3,node2")
    assert isinstance(result.exception, EnvironmentMismatch)
    assert "1 of 2 hosts do not have their part (node3)" in str(result.exception)
    assert "node3: error: cannot be reached: ssh: connect to host node3 port 22: No route to host" in result.stderr
    assert shards(hosts.directory("node2")) == ["shard-00002-of-00002.safetensors"]


@needs_hosts
def test_another_store_is_replaced_only_if_told(hosts: Hosts, store: Path) -> None:
    (hosts.directory("node1") / "manifest.json").write_text("{}")
    result = run_push(hosts, store, "--hosts", "node1", "--assign", "all")
    assert isinstance(result.exception, EnvironmentMismatch)
    assert f"another store stands in {hosts.there}" in result.stderr
    assert not shards(hosts.directory("node1"))
    assert run_push(hosts, store, "--hosts", "node1", "--assign", "all", "--force").exit_code == 0


@needs_hosts
def test_a_dry_run_reaches_no_host(hosts: Hosts, store: Path) -> None:
    result = run_push(hosts, store, "--hosts", "node1,node2", "--dry-run", "--bwlimit", "80M")
    assert result.exit_code == 0
    assert not hosts.reached()
    assert "node2: shard 2 of 2" in result.stdout
    assert "--bwlimit=80M" in result.stdout


def test_a_host_that_is_lost_is_not_waited_for(store: Path) -> None:
    result = run_push(None, store, "--hosts", "node1,node2", "--dry-run")
    assert "-e 'ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=20'" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "node1,-oProxyCommand=x"], "is not the name of a host"),
        (["--hosts", "node1,"], "is not the name of a host"),
        (["--hosts", "node1;rm"], "is not the name of a host"),
        ([], "either as --hostfile FILE or as --hosts"),
        (["--hosts", "a", "--hostfile", "f"], "either as --hostfile FILE or as --hosts"),
        (["--hosts", "a,b,c"], "the store has 2 shards, but there are 3 hosts"),
        (["--hosts", "a,b", "--to", "here"], "--to: expected an absolute path"),
        (["--hosts", "a,b", "--to", "/x\ny"], "--to: expected an absolute path"),
        (["--hosts", "a,b", "--to", "//"], "--to //: a store needs a directory of its own: give one such as /data/"),
        (["--hosts", "a,b", "--ssh", "ssh 'x"], "--ssh: .* is not a command"),
        (["--hosts", "a,b", "--ssh", " "], "--ssh ' ': names no command: give one such as 'ssh -p 2222', or leave"),
        (["--hosts", "a,b", "--assign", "a=1"], "says nothing about b"),
        (["--hosts", "a,b", "--assign", "a=1", "--assign", "b=3"], "there is no shard 3"),
        (["--hosts", "a,b", "--assign", "a=1", "--assign", "b=1"], "gives no host shard 2"),
        (["--hosts", "a,b", "--assign", "a=1", "--assign", "a=2"], "has its shards already"),
        (["--hosts", "a,b", "--assign", "c=1"], "'c' is none of the hosts"),
        (["--hosts", "a,b", "--assign", "a=x"], "expected HOST=1,2"),
    ],
)
def test_what_cannot_be_meant_is_refused(store: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        raise run_push(None, store, *arguments).exception or AssertionError


def test_a_shard_that_is_not_here_is_named(store: Path, tmp_path: Path) -> None:
    for path in store.iterdir():
        if "00002-of" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(StoreError, match=r"shard-00002-of-00002.safetensors: is missing"):
        raise run_push(None, tmp_path, "--hosts", "a,b").exception or AssertionError


def test_unequal_hosts(store: Path) -> None:
    manifest = read_manifest(store / "manifest.json")
    parts = host_parts(manifest, ["a", "b"], ["b=all", "a=2"])
    assert [(part.host, part.shards) for part in parts] == [("a", (2,)), ("b", (1, 2))]
    names = [file.name for file in parts[0].files]
    assert "shard-00002-of-00002.safetensors" in names
    assert "shard-00001-of-00002.safetensors" not in names
    assert [part.shards for part in host_parts(manifest, ["a", "b"], ["all"])] == [(1, 2), (1, 2)]
