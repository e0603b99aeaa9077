"""How the ranks of a host share its cores: divisions, bindings that are too narrow, quotas; pure parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_moe.parallel.cores import CoreShare, describe_cores, divide, place_threads, threads_fit
from dist_moe.parallel.cpu_limits import cpuset_cores, expected_cores, launcher_cores, own_cores, quota_cores
from dist_moe.parallel.launcher import Launcher

ALL = frozenset(range(8))


def cores(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


@pytest.mark.parametrize(
    ("masks", "threads"),
    [
        ([ALL], [8]),
        ([ALL] * 2, [4, 4]),
        ([ALL] * 3, [2, 2, 2]),
        ([ALL] * 9, [1] * 9),
        ([cores(0, 1, 2, 3), cores(4, 5, 6, 7)], [4, 4]),  # bound by the launcher, fairly
        ([cores(number) for number in range(8)], [1] * 8),
    ],
)
def test_ranks_share_the_cores_of_their_masks(masks: list[frozenset[int]], threads: list[int]) -> None:
    shares = divide(masks, [ALL] * len(masks), None, "auto")
    assert [share.threads for share in shares] == threads
    assert [share.mask for share in shares] == masks
    assert all(share.widened_from is None for share in shares)


def test_a_lone_rank_on_one_core_is_widened_unless_told_to_keep_it() -> None:
    assert divide([cores(3)], [ALL], None, "auto") == [CoreShare(ALL, 8, cores(3))]
    assert divide([cores(3)], [ALL], None, "keep") == [CoreShare(cores(3), 1)]


def test_ranks_that_were_all_put_on_one_core_are_widened() -> None:
    assert divide([cores(0)] * 2, [cores(0, 1)] * 2, None, "auto") == [CoreShare(cores(0, 1), 1, cores(0))] * 2
    assert divide([cores(0)] * 4, [cores(0, 1)] * 4, None, "auto") == [CoreShare(cores(0, 1), 1, cores(0))] * 4


def test_a_binding_that_loses_no_whole_core_is_kept() -> None:
    masks = [cores(0, 1), cores(2, 3), cores(4, 5)]  # a fair share is 2 2/3
    assert divide(masks, [ALL] * 3, None, "auto") == [CoreShare(mask, 2) for mask in masks]


def test_unequal_bindings_never_promise_more_threads_than_cores() -> None:
    shares = divide([cores(0), ALL - {0}], [ALL] * 2, None, "auto")
    assert shares[0] == CoreShare(ALL, 4, cores(0))
    assert sum(share.threads for share in shares) <= 8


def test_a_users_own_restriction_of_the_launcher_stays() -> None:
    assert divide([cores(0, 1)], [cores(0, 1)], None, "auto") == [CoreShare(cores(0, 1), 2)]


def test_a_quota_limits_threads() -> None:
    assert [share.threads for share in divide([ALL], [ALL], 2, "auto")] == [2]
    assert [share.threads for share in divide([ALL] * 2, [ALL] * 2, 5, "auto")] == [2, 2]
    assert [share.threads for share in divide([ALL] * 4, [ALL] * 4, 2, "auto")] == [1] * 4


@pytest.mark.parametrize(
    ("masks", "threads", "quota", "fits"),
    [
        ([ALL] * 2, [4, 4], None, True),
        ([ALL] * 2, [4, 5], None, False),
        ([cores(0), cores(1)], [1, 1], None, True),
        ([cores(0), cores(0)], [1, 1], None, False),
        ([cores(0), cores(0), ALL], [1, 1, 1], None, False),  # two on one core, though others are free
        ([cores(0), ALL], [2, 1], None, False),
        ([ALL] * 2, [2, 2], 3, False),
    ],
)
def test_threads_spin_only_if_each_has_a_core(
    masks: list[frozenset[int]], threads: list[int], quota: int | None, fits: bool
) -> None:
    assert threads_fit(masks, threads, quota) is fits


def test_cores_are_described_as_runs() -> None:
    assert describe_cores(cores(3)) == "core 3"
    assert describe_cores(cores(0, 1, 2, 5, 7, 8)) == "cores 0-2,5,7-8"


def cgroup(tmp_path: Path, line: str, files: dict[str, str]) -> tuple[Path, Path]:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(line)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "proc", tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("line", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}, 2),
        ("0::/gone\n", {"cpu.max": "50000 100000\n"}, 1),  # a container sees only the root
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "400000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 4),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("1:memory:/\n", {"cpu/cpu.cfs_quota_us": "1\n", "cpu/cpu.cfs_period_us": "1\n"}, None),
        ("0::/a\n", {"a/cpu.max": "nonsense\n"}, None),
    ],
)
def test_quotas_of_both_cgroup_versions(tmp_path: Path, line: str, files: dict[str, str], quota: int | None) -> None:
    assert quota_cores(*cgroup(tmp_path, line, files)) == quota


def test_looking_at_the_cpuset_changes_no_mask() -> None:
    before = own_cores()
    one = frozenset({min(before)})
    try:
        os.sched_setaffinity(0, one)
        assert cpuset_cores() >= before
        assert own_cores() == one
        # Nobody bound a plain process but its user.
        assert launcher_cores(Launcher()) == one
        assert expected_cores(Launcher()) == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("masks", "threads", "places"),
    [
        ([cores(0, 1)], [2], [(0, 1)]),
        ([cores(0, 1)] * 2, [1, 1], [(0,), (1,)]),
        ([cores(0, 1, 2, 3), cores(0, 1)], [2, 2], [(2, 3), (0, 1)]),
        ([cores(4, 5), cores(6, 7)], [2, 2], [(4, 5), (6, 7)]),
        ([cores(0, 1)] * 2, [2, 2], None),  # crowded
        ([cores(0, 1, 2, 3)], [2], None),  # cores to spare
        ([cores(0), cores(0, 1, 2)], [2, 1], None),
    ],
)
def test_threads_that_fill_their_cores_get_one_each(masks, threads, places) -> None:
    assert place_threads(masks, threads) == places
