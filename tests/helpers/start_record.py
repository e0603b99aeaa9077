"""A rank's start record, to be changed in one place or another."""

from __future__ import annotations

from dist_moe.engine.start.agreement import StartRecord

RECORD = StartRecord(
    protocol=1,
    package="1.2.3",
    numerics=1,
    manifest="0123456789abcdef",
    known_answers="fedcba9876543210",
    kv="f16",
    context=4096,
    resident=4096,
    prefill_chunk=256,
    experts="auto",
    exchange="auto",
    wire="exact",
    check="fast",
    scrub="off",
    weights="mapped",
    isa="avx2",
    threads=4,
    available_bytes=17_300_000_000,
    memory_limit="the host's memory",
    medium="disk",
    library="MPICH 5.0.2",
    directory="/data/store",
)
