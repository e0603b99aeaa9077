"""The start-up agreement without ranks: records as bytes, who is odd, and what the table says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dist_moe.engine.start.agreement import (
    StartRecord,
    Versions,
    agree_on,
    describe_differences,
    find_differences,
    own_record,
    own_versions,
    weights_checksum,
)
from dist_moe.engine.start.options import EngineOptions
from dist_moe.engine.start.rank_table import name_hosts, number_runs, rank_table
from dist_moe.kernels import Kernels, KvFormat
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store
from helpers.start_record import RECORD

HOSTS = ("a", "a", "b", "c")


def test_a_record_survives_its_bytes() -> None:
    assert StartRecord.decode(RECORD.encode()) == RECORD
    assert len(RECORD.encode()) == len(replace(RECORD, directory="", package="", context=2**64 - 1).encode())


def test_of_a_long_text_the_end_is_kept() -> None:
    long = replace(RECORD, directory="/" + "ä" * 200 + "/store")
    directory = StartRecord.decode(long.encode()).directory
    assert directory.startswith("...")
    assert directory.endswith("ä/store")
    assert len(long.encode()) == len(RECORD.encode())


def test_the_layout_of_the_versions_never_changes() -> None:
    # A rank of any version must be able to read these bytes: do not change this test.
    assert Versions(1, "0.1.0", 2).encode() == (b"\x01\0\0\0\0\0\0\0" + b"0.1.0" + bytes(27) + b"\x02\0\0\0\0\0\0\0")


def test_equal_ranks_agree() -> None:
    reported = replace(RECORD, isa="neon", threads=1, available_bytes=5, library="Open MPI 5", directory="/elsewhere")
    assert find_differences([RECORD, reported, RECORD]) == {}
    assert agree_on(World(), own_versions()) == [own_versions()]


@pytest.mark.parametrize(
    ("change", "title"),
    [
        ({"protocol": 2}, "protocol"),
        ({"package": "1.2.4"}, "package"),
        ({"numerics": 2}, "numerics"),
        ({"manifest": "1" * 16}, "manifest"),
        ({"known_answers": "1" * 16}, "known answers"),
        ({"kv": "q8"}, "KV"),
        ({"context": 4095}, "context"),
        ({"prefill_chunk": 8}, "prefill chunk"),
        ({"experts": "whole"}, "experts"),
        ({"check": "full"}, "check"),
        ({"scrub": "on"}, "scrub"),
    ],
)
def test_a_rank_that_differs_is_named(change: dict[str, object], title: str) -> None:
    records = [RECORD, RECORD, replace(RECORD, **change), RECORD]
    differences = find_differences(records)
    assert differences == {next(iter(change)): [2]}
    sentence, *table = describe_differences(records, HOSTS, differences)
    assert sentence.startswith(f"rank 2 on b differs from the other ranks in {title}: ")
    (marked,) = [line for line in table if line.endswith("<- differs")]
    assert marked.startswith("2 ")
    assert str(next(iter(change.values()))) in marked
    assert len(table) == 3  # head, the others, the odd one


def test_the_majority_is_right_whatever_rank_0_says() -> None:
    records = [replace(RECORD, package="0.9"), RECORD, RECORD, replace(RECORD, kv="q8")]
    differences = find_differences(records)
    assert differences == {"package": [0], "kv": [3]}
    sentence, *table = describe_differences(records, HOSTS, differences)
    assert sentence.startswith("ranks 0, 3 on a, c differ from the other ranks in package, KV: ")
    assert "0.9" in table[1]


def test_of_two_the_first_is_right() -> None:
    assert find_differences([RECORD, replace(RECORD, package="0.9")]) == {"package": [1]}


def test_a_wrong_store_shows_where_it_is() -> None:
    records = [RECORD, replace(RECORD, manifest="1" * 16, directory="/data/old")]
    lines = describe_differences(records, HOSTS, find_differences(records))
    assert lines[1].split() == ["ranks", "hosts", "manifest", "store"]
    assert "/data/old" in lines[3]


def test_many_ranks_and_hosts_are_short() -> None:
    assert number_runs([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert name_hosts(["a", "b", "a", "c", "d", "e"]) == "a, b, c and 2 more"
    hosts = [f"node{rank // 4}" for rank in range(64)]
    assert len(rank_table([RECORD] * 64, hosts, ["package"])) == 2


def test_this_ranks_record(demo_store: Store) -> None:
    with Kernels(1) as kernels:
        found = own_record(demo_store, kernels, "none", EngineOptions(9, kv=KvFormat.Q8, prefill_chunk=5))
        assert found.known_answers == f"{kernels.self_test():016x}"
    assert StartRecord.decode(found.encode()) == found
    assert found.available_bytes > 0
    assert found.directory == str(demo_store.directory)


def test_who_packed_a_store_does_not_matter(demo_store: Store) -> None:
    manifest = demo_store.manifest
    assert weights_checksum(replace(manifest, package_version="9")) == weights_checksum(manifest)
    assert weights_checksum(replace(manifest, source_name="other")) != weights_checksum(manifest)
