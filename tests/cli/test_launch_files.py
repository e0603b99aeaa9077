"""What launch/ holds: scripts that shells read, a host file for either mpirun, an MPIJob, a container file."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
import yaml

from helpers.mpijob_schema import MPIJOB

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
CLUSTER = LAUNCH / "cluster.sh"
DOCKERFILE = LAUNCH / "container" / "Dockerfile"
VERSIONS = {
    "mpich": "HYDRA build details:\n    Version: 5.0.2",
    "openmpi": "mpirun (Open MPI) 5.0.11",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.13",
    "other": "mpirun of somebody else",
}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", str(DOCKERFILE)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def cluster(tmp_path: Path, mpi: str, hosts: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command that launch/cluster.sh would run where this mpirun is."""
    programs = tmp_path / mpi
    programs.mkdir(exist_ok=True)
    for name, text in (("mpirun", f"cat <<'END'\n{VERSIONS[mpi]}\nEND"), ("dist-moe", "true")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "hosts").write_text(hosts)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("DIST_MOE_", "UCX_"))}
    environ |= {"PATH": f"{programs}:/usr/bin:/bin", **variables}
    command = [str(CLUSTER), "--dry-run", str(tmp_path / "hosts"), "run", "-p", "Once upon a time"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, env=environ)


@pytest.mark.parametrize("hosts", ["node1:2\nnode2 # bare\n", "# all\nnode1 slots=2 max_slots=4\n\nnode2 slots = 1"])
@pytest.mark.parametrize(("mpi", "option"), [("mpich", "-hosts"), ("intel", "-hosts"), ("openmpi", "--host")])
def test_any_mpirun_reads_either_dialect(tmp_path: Path, mpi: str, option: str, hosts: str) -> None:
    done = cluster(tmp_path, mpi, hosts)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[words.index(option) + 1] == "node1:2,node2:1"
    assert words[words.index("-n") + 1] == "3"
    assert words[-4:] == [str(tmp_path / mpi / "dist-moe"), "run", "-p", "Once upon a time"]


def test_the_network_and_the_variables_are_passed_on(tmp_path: Path) -> None:
    done = cluster(tmp_path, "openmpi", "a slots=1\n", DIST_MOE_IFACE="eth1", UCX_TLS="tcp")
    assert "--prtemca prte_if_include eth1 --mca btl_tcp_if_include eth1" in done.stdout
    assert "-x UCX_TLS" in done.stdout
    assert "-iface eth1" in cluster(tmp_path, "mpich", "a:1\n", DIST_MOE_IFACE="eth1").stdout


@pytest.mark.parametrize(
    ("mpi", "hosts", "code", "message"),
    [
        ("other", "a:1\n", 3, "neither MPICH's, Intel MPI's nor Open MPI's"),
        ("mpich", "a:x\n", 2, "expected host, host:ranks or host slots=ranks, found: a:x"),
        ("mpich", "# none\n", 2, "names no host"),
    ],
)
def test_what_cannot_be_started_is_explained(tmp_path: Path, mpi: str, hosts: str, code: int, message: str) -> None:
    done = cluster(tmp_path, mpi, hosts)
    assert done.returncode == code
    assert message in done.stderr


@pytest.fixture(scope="module")
def mpijob() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes" / "mpijob.yaml").read_text())
    return job


def test_the_mpijob_is_one(mpijob: dict[str, Any]) -> None:
    validate = fastjsonschema.compile(MPIJOB)
    validate(mpijob)
    broken = copy.deepcopy(mpijob)
    broken["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["contaners"] = []
    with pytest.raises(fastjsonschema.JsonSchemaException, match="contaners"):
        validate(broken)


def test_the_mpijobs_figures_agree(mpijob: dict[str, Any]) -> None:
    spec = mpijob["spec"]
    launcher, worker = (spec["mpiReplicaSpecs"][role] for role in ("Launcher", "Worker"))
    words = launcher["template"]["spec"]["containers"][0]["command"]
    assert int(words[words.index("-n") + 1]) == worker["replicas"] * spec["slotsPerWorker"]
    pod = worker["template"]["spec"]
    container = pod["containers"][0]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    wanted = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]["labelSelector"]
    assert wanted["matchLabels"].items() <= worker["template"]["metadata"]["labels"].items()
    assert int(container["lifecycle"]["preStop"]["exec"]["command"][1]) < pod["terminationGracePeriodSeconds"]


def test_the_mpijob_fits_the_container(mpijob: dict[str, Any]) -> None:
    text = DOCKERFILE.read_text()
    spec = mpijob["spec"]
    assert f"HostKey {spec['sshAuthMountPath']}/id_rsa" in text
    for role in ("Launcher", "Worker"):
        pod = spec["mpiReplicaSpecs"][role]["template"]["spec"]
        assert f"USER {pod['securityContext']['runAsUser']}\n" in text
        for word in pod["containers"][0]["command"]:
            if word.startswith("/opt/") or word.endswith("sshd_config"):
                assert str(Path(word).parent) in text
                assert Path(word).name in text


def test_what_the_container_copies_is_there() -> None:
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE):
        for name in sources.split():
            assert (ROOT / name).exists(), name
