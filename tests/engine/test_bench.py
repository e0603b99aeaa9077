"""What bench counts and how it divides; the figures themselves are the machine's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.engine.bench import Bench, BenchPlan, BenchReport, Case, Timing
from dist_moe.engine.measuring.bench_bound import Machine, StepWork, Work, step_work
from dist_moe.engine.measuring.bench_machine import (
    FINALISTS,
    PASSES,
    Measurement,
    ReadSpeed,
    order_argument,
    read_speed,
)
from dist_moe.engine.measuring.bench_overhead import KernelClock, small_config
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.errors import Interrupted
from dist_moe.kernels import Kernels, KvFormat, WeightFormat
from dist_moe.model.step import Slice, Step
from dist_moe.parallel.world import World
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from dist_moe.store.synthetic import SyntheticModel, write_synthetic
from helpers.tiny_model import TinyModel

TINY = TinyModel(layers=3, model_dim=64, heads=4, kv_heads=2, experts=16, experts_per_token=3, expert_hidden=64)
PLAN = BenchPlan(
    cases=(Case("prefill", 40, 1, 0), Case("decode", 3, 1, 0), Case("decode", 3, 5, 70)),
    repetitions=2,
    read_bytes=1 << 20,
    prefill_chunk=32,
    kv=KvFormat.F16,
    seed=3,
)

MakeRuntime = Callable[..., Runtime]


def make_synthetic(directory: Path, fmt: WeightFormat = WeightFormat.Q4) -> Store:
    config = read_hf_config(TINY.write(directory / "tiny"))
    options = StoreOptions(format=fmt, threads=1)
    write_synthetic(SyntheticModel(config, "tiny"), directory / "store", options, lambda *_: None)
    return Store.open(directory / "store")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_synthetic(tmp_path)


def run_bench(engine: Runtime, plan: BenchPlan = PLAN) -> BenchReport:
    return Bench(engine, plan, lambda _: None, lambda: False).run()


# ---- what a step must do ----


@pytest.mark.parametrize("fmt", WeightFormat)
@pytest.mark.parametrize("kv", KvFormat)
def test_a_decode_step_reads_these_units(tmp_path: Path, fmt: WeightFormat, kv: KvFormat) -> None:
    """Layers 0 and 2 have experts, layer 1 is dense; every byte is found in the store itself."""
    store = make_synthetic(tmp_path, fmt)
    config, manifest = store.config, store.manifest
    expected = 2 * store.common("embedding").itemsize * config.model_dim
    for layer in range(3):
        for kind, count in (("head", config.heads), ("kv_head", config.kv_heads)):
            expected += sum(store.unit(kind, layer, i).nbytes for i in range(count))
        name = f"layers.{layer}."
        expected += sum(store.common(name + norm).nbytes for norm in ("attention_norm", "q_norm", "k_norm"))
        if config.is_dense(layer):
            chunks = range(manifest.layer_chunks_per_expert(layer))
        else:
            expected += store.common(name + "router").nbytes + store.common(name + "mlp_norm").nbytes
            chunks = range(manifest.layer_chunks_per_expert(layer) * {0: 5, 2: 4}[layer])
        expected += sum(store.unit("chunk", layer, i).nbytes for i in chunks)
    blocks = store.present_units("vocabulary", 0)
    expected += sum(store.unit("vocabulary", 0, int(i)).nbytes for i in blocks)
    value_bytes = {KvFormat.F32: 4, KvFormat.F16: 2, KvFormat.Q8: 1 + 4 / 32}[kv]
    expected += (100 + 7) * 3 * 2 * config.kv_heads * config.head_dim * value_bytes
    step = Step((Slice(0, 100, (5,)), Slice(1, 7, (6,))), (0, 1), (0.0, 0.0), False, config.vocabulary)
    assert step_work(manifest, kv, step, [5, 4]).total.bytes == expected


def test_a_prefill_step_does_these_operations(store: Store) -> None:
    """Two operations per weight and token, and per pair of positions, head and dimension of q k and of p v."""
    config, T = store.config, 20
    D, P, H, G = config.model_dim, config.head_dim, config.heads, config.kv_heads
    per_token = 3 * D * P * (2 * H + 2 * G) + D * 3 * TINY.dense_hidden
    per_token += 2 * config.experts_per_token * 3 * D * config.expert_hidden
    pairs = sum(50 + i + 1 for i in range(T))
    step = Step((Slice(0, 50, tuple(range(T))),), (19,), (0.0,), False, config.vocabulary)
    total = step_work(store.manifest, KvFormat.F16, step, [16, 16]).total
    assert total.int8 == 2 * (T * per_token + D * config.vocabulary)
    assert total.f32 == 2 * T * 2 * D * config.experts + 2 * 3 * 2 * pairs * H * P
    with_q8 = step_work(store.manifest, KvFormat.Q8, step, [16, 16]).total
    assert with_q8.int8 - total.int8 == total.f32 - with_q8.f32 == 3 * 2 * pairs * H * P


def test_a_step_without_rows_has_no_lm_head(store: Store) -> None:
    step = Step((Slice(0, 0, (1, 1)),), (1,), (0.0,), False, 300)
    with_row = step_work(store.manifest, KvFormat.F16, step, [3, 3]).total.bytes
    without = step_work(store.manifest, KvFormat.F16, replace(step, logit_rows=()), [3, 3]).total.bytes
    blocks = store.present_units("vocabulary", 0)
    assert with_row - without == sum(store.unit("vocabulary", 0, int(i)).nbytes for i in blocks)


def test_each_phase_takes_the_longer_of_reading_and_computing() -> None:
    machine = Machine(read=10.0, int8=100.0, f32=20.0)
    step = StepWork((Work(bytes=50, int8=100), Work(bytes=1, int8=200, f32=60), Work()))
    assert step.seconds(machine) == 5.0 + (2.0 + 3.0) + 0.0
    assert step.total == Work(51, 300, 60)


def test_the_share_is_the_least_time_over_the_median() -> None:
    timing = Timing(Case("decode", 4, 2, 0), (9.0, 20.0, 8.0), (StepWork((Work(bytes=45),)),) * 2, 0.0)
    assert timing.share(Machine(10.0, 1.0, 1.0)) == 1.0
    assert timing.tokens_per_s(2.0) == 4.0


# ---- the machine's figures ----


def test_a_host_reads_as_fast_as_its_slowest_rank() -> None:
    """Ranks 0 and 1 on one host, 2 on another; the second way's last pass is the best of all."""
    figures_Wfn = np.full((3, FINALISTS, 2 + PASSES), 10.0)
    figures_Wfn[:, 0, :2], figures_Wfn[:, 1, :2] = (1, 0), (4, 512)
    figures_Wfn[:, 1, -1] = (1.0, 2.0, 4.0)
    figures_Wn = np.concatenate([np.full((3, 1), 80.0), figures_Wfn.reshape(3, -1)], axis=1)
    speed = read_speed(figures_Wn, (0, 0, 1), "store")
    assert (speed.rate, speed.bytes, speed.streams, speed.ahead_bytes) == (160 / 2 + 80 / 4, 240, 4, 512)
    figures_Wn[:, 0] = 0
    assert read_speed(figures_Wn, (0, 0, 1), "memory").rate == 0.0


def test_a_small_piece_of_memory_proves_nothing(make_engine: MakeRuntime, store: Store) -> None:
    bench = Bench(make_engine(store), replace(PLAN, read_bytes=1000), lambda _: None, lambda: False)
    slow, fast = (ReadSpeed(rate, "store", 100, 1, 0) for rate in (4.0, 5.0))
    little, enough = (ReadSpeed(9.0, "memory", size, 1, 0) for size in (800, 1000))
    assert bench._better(slow, little, fast, little) == (fast, little)
    assert bench._better(fast, enough, slow, little) == (enough, fast)


def test_the_overhead_is_that_of_the_same_layers_and_experts(store: Store) -> None:
    config = store.config
    small = small_config(config)
    for name in ("layers", "heads", "kv_heads", "experts", "experts_per_token", "dense_layers"):
        assert getattr(small, name) == getattr(config, name)
    assert (small.model_dim, small.expert_hidden, small.dense_hidden) == (32, 32, 32)


def test_the_clock_of_kernels_counts_them_alone() -> None:
    x_TD = np.ones((64, 512), np.float32)
    with Kernels(1) as kernels:
        with KernelClock() as clock:
            time.sleep(0.01)
        assert clock.seconds == 0.0
        with KernelClock() as clock:
            kernels.rmsnorm(x_TD, x_TD, np.ones(512, np.float32), 1e-6)
            time.sleep(0.2)
        assert 0.0 < clock.seconds < 0.2
    assert sys.getprofile() is None


# ---- a session ----


def test_a_session_measures_every_case(make_engine: MakeRuntime, store: Store) -> None:
    engine = make_engine(store, threads=2, prefill_chunk=32)
    report = run_bench(engine)
    assert [timing.case for timing in report.timings] == list(PLAN.cases)
    prefill, single, batch = report.timings
    assert [len(timing.seconds) for timing in report.timings] == [2, 2, 2]
    assert (len(prefill.steps), len(single.steps), len(batch.steps)) == (2, 3, 3)
    assert single.picked_experts == 3
    assert 3 < batch.picked_experts <= 15
    assert engine.model.observer is None
    limits = report.limits
    assert min(limits.read.rate, limits.int8, limits.f32, limits.matmul, report.overhead_s, report.load_s) > 0
    assert {limits.read.source, limits.other_read.source} == {"store", "memory"}
    assert report.worst_share()[0] > 0


def test_a_depth_is_filled_with_finite_numbers(make_engine: MakeRuntime, store: Store) -> None:
    engine = make_engine(store, prefill_chunk=32)
    empty_bytes = engine.model.cache.allocated_bytes
    run_bench(engine, replace(PLAN, cases=(Case("decode", 1, 2, 130),), repetitions=1))
    assert empty_bytes == 0
    block_bytes = 3 * 2 * 2 * 64 * 32 * 2  # layers, KV heads, K and V, positions, head dim, bytes
    assert engine.model.cache.allocated_bytes == 2 * 3 * block_bytes


def test_experts_are_counted_as_they_are_routed(make_engine: MakeRuntime, store: Store) -> None:
    """The counts of a step of two tokens are those of the tokens' own steps, merged."""
    engine = make_engine(store)
    seen: list[set[int]] = []
    engine.model.observer = lambda layer, half, _: (
        seen.append(set(engine.model.picked_TK.ravel().tolist())) if half == "experts" and layer != 1 else None
    )
    for sequence, token in ((10, 7), (11, 90)):
        engine.crew.run(Step((Slice(sequence, 0, (token,)),), (0,), (0.0,), False, 300))
    engine.model.observer = None
    bench = Bench(engine, PLAN, lambda _: None, lambda: False)
    both = Step((Slice(20, 0, (7,)), Slice(21, 0, (90,))), (0, 1), (0.0, 0.0), False, 300)
    assert bench._count([both]) == [[len(seen[0] | seen[2]), len(seen[1] | seen[3])]]


def test_a_session_can_be_interrupted(make_engine: MakeRuntime, store: Store) -> None:
    engine = make_engine(store, prefill_chunk=32)
    with pytest.raises(Interrupted, match="incomplete"):
        Bench(engine, PLAN, lambda _: None, lambda: True).run()
    assert not engine.busy


@pytest.mark.parametrize("fmt", [WeightFormat.F32, WeightFormat.BF16, WeightFormat.Q8])
def test_every_format_can_be_measured(make_engine: MakeRuntime, tmp_path: Path, fmt: WeightFormat) -> None:
    engine = make_engine(make_synthetic(tmp_path, fmt), prefill_chunk=32)
    report = run_bench(engine, replace(PLAN, cases=PLAN.cases[:2], repetitions=1))
    assert report.limits.matmul > 0
    assert {timing.total.int8 > 0 for timing in report.timings} == {fmt.quantized}


@pytest.mark.mpi
def test_all_ranks_are_measured(world: World, tmp_path: Path) -> None:
    directory = Path(world.gather_texts(str(tmp_path))[0])
    if world.is_leader:
        make_synthetic(directory)
    world.barrier()
    engine = Runtime(Store.open(directory / "store"), world, EngineOptions(context=512, prefill_chunk=32))
    if not world.is_leader:
        engine.serve()
        return
    alone_W = engine.crew.measure(order_argument(Measurement.INT8))
    assert alone_W.shape == (world.size, 1)
    report = run_bench(engine)
    engine.stop()
    assert report.limits.read.bytes <= 1 << 20
    assert all(timing.share(report.limits.machine) > 0 for timing in report.timings)
