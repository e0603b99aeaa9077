"""--threads-file: threads by host name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_moe.cli.threads_file import read_threads_file, threads_of_host
from dist_moe.errors import UsageError


def test_hosts_are_found_by_whole_or_short_name(tmp_path: Path) -> None:
    path = tmp_path / "threads.toml"
    path.write_text('node1 = 4\n"node2.cluster" = 16\n"node3.a" = 2\n"node3.b" = 3\n')
    table = read_threads_file(str(path))
    assert threads_of_host(table, "node1") == 4
    assert threads_of_host(table, "node1.cluster") == 4
    assert threads_of_host(table, "node2.cluster") == 16
    assert threads_of_host(table, "node2") == 16
    assert threads_of_host(table, "node3.b") == 3
    assert threads_of_host(table, "node4") is None
    assert read_threads_file(None) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 = 0\n", "node1: expected a number of threads from 1 to 1024, found 0"),
        ("node1 = true\n", "found True"),
        ('node1 = "4"\n', "found '4'"),
        ("node1.cluster = 4\n", "quote a name with dots"),
        ("node1 4\n", "is not valid TOML"),
        ("node1 = " + "[" * 10**5, "is not valid TOML"),
    ],
)
def test_a_file_that_is_wrong_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "threads.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_threads_file(str(path))


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_threads_file(str(tmp_path / "none.toml"))
