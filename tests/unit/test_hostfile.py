"""Host files of MPICH and of Open MPI."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_moe.errors import UsageError
from dist_moe.parallel.hostfile import HostEntry, read_hostfile

EXAMPLES = Path(__file__).resolve().parents[2] / "hostfiles"


@pytest.mark.parametrize("dialect", ["mpich", "openmpi"])
def test_the_examples_of_the_repository(dialect: str) -> None:
    hostfile = read_hostfile(EXAMPLES / f"{dialect}.example.txt")
    assert hostfile.dialect == dialect
    assert [(entry.host, entry.ranks) for entry in hostfile.entries] == [("node1", 2), ("node2", 2)]
    assert hostfile.ranks == 4


def test_bare_names_fit_both(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# all\nnode1\n\nnode2.cluster # the big one\n10.0.0.3\n")
    hostfile = read_hostfile(path)
    assert hostfile.dialect is None
    assert hostfile.entries[1] == HostEntry("node2.cluster", None, 4)
    assert hostfile.command("openmpi") == f"mpirun --hostfile {path} -n 3"
    assert hostfile.command("mpich") == f"mpirun -f {path} -n 3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1:2\nnode2 slots=2\n", "mixes two dialects: line 1 is MPICH's, line 2 Open MPI's"),
        ("node1:two\n", "line 1: expected `host`, `host:ranks`"),
        ("# nothing\n", "names no host"),
        ("node1 and node2\n", "line 1"),
    ],
)
def test_a_file_that_is_wrong_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_hostfile(path)


def test_other_words_of_the_dialects(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("node1 slots = 4 max_slots=8\nnode2 max-slots=2\n")
    assert [entry.ranks for entry in read_hostfile(path).entries] == [4, None]
    path.write_text("node1:4 ifname=eth1\n")
    assert read_hostfile(path).dialect == "mpich"
