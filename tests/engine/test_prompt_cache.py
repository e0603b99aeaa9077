"""Saved prompts: the rows of blocks, what a file holds, and every reason to refuse one; one rank."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dist_moe.engine.requests.request import Request, SamplingOptions
from dist_moe.engine.runtime import Runtime
from dist_moe.engine.steps.prompt_cache import PromptCache
from dist_moe.errors import UsageError
from dist_moe.files import NewFile, write_errors
from dist_moe.kernels import Kernels, KvFormat, KvView, aligned_empty, kv_block_bytes
from dist_moe.model.kv_layout import read_rows, row_bytes, write_rows
from dist_moe.store.prompt_file import PromptFile
from helpers.tiny_model import random_ids

TEXT = random_ids(150, 300, seed=1)
MakeRuntime = Callable[..., Runtime]


@pytest.fixture
def store(make_store, tiny_directory: Path):
    return make_store(tiny_directory, "q8")


@pytest.fixture
def saved(make_engine: MakeRuntime, store, tmp_path: Path) -> Path:
    """TEXT, saved in f16."""
    engine = make_engine(store)
    generate(engine, TEXT, 1)
    assert engine.prompt_cache.save(tmp_path / "saved", TEXT) == len(TEXT)
    return tmp_path / "saved"


def generate(engine: Runtime, ids: tuple[int, ...], tokens: int = 6) -> tuple[int, list[int], bytes]:
    """Tokens reused, ids, and the bits of the logits."""
    rows: list[bytes] = []
    sampling = SamplingOptions(0.8, seed=3)
    [completion] = engine.generate([Request(ids, tokens, sampling, on_logits=lambda row: rows.append(row.tobytes()))])
    return completion.reused_tokens, completion.ids, b"".join(rows)


@pytest.mark.parametrize("P", [32, 48, 128])
@pytest.mark.parametrize("kv", KvFormat)
def test_a_row_is_what_the_kernel_stored_of_a_position(kv: KvFormat, P: int) -> None:
    heads, tokens = 3, 64
    kv_TR = np.random.default_rng(P).standard_normal((tokens, 2 * heads * P), dtype=np.float32)
    block = aligned_empty(heads * kv_block_bytes(kv, P), np.uint8)
    block[:] = 0xEE
    view = KvView([block], np.zeros(tokens, np.int64), np.arange(tokens), 0, kv)
    Kernels(1).kv_store(view, np.zeros(tokens, np.int32), kv_TR, 0, heads * P, heads, P, 0)
    rows = read_rows(block.reshape(heads, -1), kv, P)
    assert rows.shape == (tokens, heads, row_bytes(kv, P))
    for part, values in enumerate((kv_TR[:, : heads * P], kv_TR[:, heads * P :])):
        expected = values.reshape(tokens, heads, P)
        half = rows[:, :, part * rows.shape[2] // 2 :][:, :, : rows.shape[2] // 2]
        if kv == KvFormat.Q8:
            groups = -(-P // 32)
            codes = half[:, :, : 32 * groups].view(np.int8).astype(np.float32)[:, :, :P]
            scales = np.repeat(half[:, :, 32 * groups :].copy().view(np.float32), 32, axis=2)[:, :, :P]
            assert np.abs(codes * scales - expected).max() <= scales.max() * 0.5001
        else:
            dtype = np.float32 if kv == KvFormat.F32 else np.float16
            assert np.array_equal(half.copy().view(dtype), expected.astype(dtype))
    other = np.full_like(block, 0xEE)
    write_rows(other.reshape(heads, -1), rows, kv, P)
    assert np.array_equal(other, block)


@pytest.mark.parametrize("kv", KvFormat)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_a_restored_text_continues_with_the_bits_of_a_fresh_one(
    make_engine: MakeRuntime, store, tmp_path: Path, kv: KvFormat, length: int
) -> None:
    first = make_engine(store, kv=kv)
    generate(first, TEXT[:length], 1)
    assert first.prompt_cache.save(tmp_path / "a", TEXT[:length]) == length
    engine = make_engine(store, kv=kv)
    assert engine.prompt_cache.restore(PromptFile(tmp_path / "a")) == length
    prompt = (*TEXT[:length], 7, 8)
    found, expected = generate(engine, prompt), generate(make_engine(store, kv=kv), prompt)
    assert found[0] == length
    assert found[1:] == expected[1:]


def test_the_file_is_plain_safetensors(saved: Path, store) -> None:
    tensors = load_file(saved)
    config = store.config
    assert tensors.pop("ids").tolist() == list(TEXT)
    assert sorted(tensors) == [f"layers.{layer}" for layer in range(config.layers)]
    shape = (len(TEXT), config.kv_heads, row_bytes(KvFormat.F16, config.head_dim))
    assert {tensor.shape for tensor in tensors.values()} == {shape}


def test_saving_twice_gives_the_same_bytes(make_engine: MakeRuntime, store, saved: Path) -> None:
    engine = make_engine(store)
    engine.prompt_cache.restore(PromptFile(saved))
    generate(engine, (*TEXT, 5), 3)
    engine.prompt_cache.save(saved.with_name("again"), TEXT)
    assert saved.with_name("again").read_bytes() == saved.read_bytes()


def test_only_what_a_prompt_shares_is_restored(make_engine: MakeRuntime, store, saved: Path) -> None:
    engine = make_engine(store)
    prompt = (*TEXT[:70], 1, 2)
    assert TEXT[70] != 1
    assert engine.prompt_cache.restore(PromptFile(saved), prompt) == 70
    assert generate(engine, prompt)[0] == 70
    assert make_engine(store).prompt_cache.restore(PromptFile(saved), (TEXT[0] + 1,)) == 0


def test_nothing_resident_writes_nothing(make_engine: MakeRuntime, store, tmp_path: Path) -> None:
    assert make_engine(store).prompt_cache.save(tmp_path / "none", TEXT) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused(make_engine: MakeRuntime, store, saved: Path) -> None:
    with pytest.raises(UsageError, match="150 positions, more than may stay resident: raise --ctx"):
        make_engine(store, context=128).prompt_cache.restore(PromptFile(saved))
    with pytest.raises(UsageError, match="150 positions"):
        make_engine(store, resident=0).prompt_cache.restore(PromptFile(saved))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "truncated: expected at least"),
        (lambda data: data[:100], "truncated"),
        (lambda data: b"", "expected"),
        (lambda data: data + b"x", "expected .* bytes, actual"),
        (lambda data: data[:-50] + bytes([data[-50] ^ 4]) + data[-49:], "is damaged: its checksum is"),
        (lambda data: data.replace(b'"kv":"f16"', b'"kv":"f32"', 1), "is damaged"),
        (lambda data: data.replace(b'"version":"1"', b'"version":"2"', 1), "with format version 2, but here it is 1"),
        (lambda data: b"hello, this is no such file at all", "header is damaged"),
        (lambda data: (10**5).to_bytes(8, "little") + b"[" * 10**5, "header is damaged"),
    ],
)
def test_damaged_files_are_refused(saved: Path, change, words: str) -> None:
    saved.write_bytes(change(saved.read_bytes()))
    with pytest.raises(UsageError, match=rf"{saved}.*{words}.*remove it, and the next run makes it anew"):
        PromptFile(saved)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"ids": np.zeros(3, np.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="is a safetensors file, but not a prompt cache"):
        PromptFile(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="there is none"):
        PromptFile(tmp_path / "absent")


def test_another_kv_format_is_refused(make_engine: MakeRuntime, store, saved: Path) -> None:
    with pytest.raises(UsageError, match=r"saved with KV format f16, but here it is q8: give the same --kv"):
        make_engine(store, kv=KvFormat.Q8).prompt_cache.restore(PromptFile(saved))


def test_another_store_is_refused(make_engine, make_store, tiny_directory: Path, demo_store, saved: Path) -> None:
    with pytest.raises(UsageError, match=r"saved with model .*, but here it is .*: give that model"):
        make_engine(demo_store).prompt_cache.restore(PromptFile(saved))
    with pytest.raises(UsageError, match=r"saved with weights q8.*, but here it is q4.*: give the store"):
        make_engine(make_store(tiny_directory, "q4")).prompt_cache.restore(PromptFile(saved))


def test_a_store_cut_otherwise_is_welcome(make_engine, make_store, tiny_directory: Path, saved: Path) -> None:
    engine = make_engine(make_store(tiny_directory, "q8", nodes=2))
    assert engine.prompt_cache.restore(PromptFile(saved)) == len(TEXT)


def test_other_rotary_settings_and_numerics_are_refused(make_engine: MakeRuntime, store, saved: Path) -> None:
    engine = make_engine(store)
    config = replace(store.config, inv_freq=store.config.inv_freq / np.float32(2))
    cache = PromptCache(engine.crew, engine._prefixes, replace(store.manifest, config=config), KvFormat.F16)
    with pytest.raises(UsageError, match=r"saved with rotary settings plain.*: give the same --rope-scaling"):
        cache.restore(PromptFile(saved))
    engine.prompt_cache._identity["numerics"] = "2"
    with pytest.raises(UsageError, match=r"saved with numerics version 1, but here it is 2"):
        engine.prompt_cache.restore(PromptFile(saved))


def test_the_old_file_stays_when_the_disk_is_full(make_engine, store, saved: Path, monkeypatch) -> None:
    before = saved.read_bytes()
    engine = make_engine(store)
    generate(engine, (*TEXT, 1), 1)
    write, left = NewFile.write, [3]

    def write_little(self: NewFile, data: memoryview) -> None:
        left[0] -= 1
        if left[0] < 0:
            with write_errors(self._path):
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(NewFile, "write", write_little)
    with pytest.raises(UsageError, match=r"saved: cannot be written \(No space left on device\): make room"):
        engine.prompt_cache.save(saved, (*TEXT, 1))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    assert not engine.busy
    assert generate(engine, (*TEXT, 1))[0] == len(TEXT)


def test_the_header_names_what_it_was_made_with(saved: Path) -> None:
    header = saved.read_bytes()[8:].split(b"}", 1)[0] + b"}}"
    metadata = json.loads(header)["__metadata__"]
    assert (metadata["format"], metadata["version"], metadata["kv"]) == ("dist-moe prompt cache", "1", "f16")
    assert metadata["weights"].startswith("q8, groups of ")
    assert set(metadata) == {"format", "version", "numerics", "source", "weights", "rope", "kv", "checksum"}
