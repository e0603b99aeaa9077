"""QW3W files as checkpoints: both versions, both kinds of q4, exact values, and refusals."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.names import locations
from dist_moe.checkpoint.qw3w_checkpoint import Qw3wCheckpoint
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.checkpoint.source import open_source
from dist_moe.errors import CheckpointError
from helpers.tiny_qw3w import MODEL, file_bytes, packed, quantized, record, write_qw3w

KINDS = {"q8": "qw3w_q8", "q4": "qw3w_q4", "q4z": "qw3w_q4_zero_point"}
EXPERT = "layers.1.experts.3."
MATRIX = "model.layers.0.mlp.experts.0.up_proj.weight"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("half", [False, True])
def test_the_same_model_as_from_hugging_face(tmp_path: Path, version: int, half: bool) -> None:
    values = write_qw3w(tmp_path / "all.bin", version=version, half=half)
    theirs, ours = Checkpoint.open(MODEL.write(tmp_path / "hf")), open_source(tmp_path / "all.bin")
    assert isinstance(ours, Qw3wCheckpoint)
    assert str(ours.config) == str(theirs.config)
    assert ours.names() == theirs.names()
    assert ours.preferred_dtype() is None
    for name in ours.names():
        assert ours.shape(name) == theirs.shape(name)
        assert ours.source_dtype(name) == ("f16" if half else "f32")
        expected = values[locations(ours.config, values)[name].tensor]
        assert np.array_equal(ours.read(name), expected), name


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [0, 32, 48, 128])  # 128 and 48 are no divisors of a row
def test_every_quantized_value_is_read_exactly(tmp_path: Path, version: int, kind: str, group: int) -> None:
    values = write_qw3w(tmp_path / "all.bin", kind=kind, group=group, version=version)
    checkpoint = open_source(tmp_path / "all.bin")
    assert checkpoint.preferred_dtype() == checkpoint.source_dtype(EXPERT + "up") == KINDS[kind]
    assert checkpoint.source_dtype("layers.0.q") == "f32"
    for name in checkpoint.names():
        expected = values[locations(checkpoint.config, values)[name].tensor]
        assert np.array_equal(checkpoint.read(name), expected), name
        if expected.ndim == 2:
            part = checkpoint.read(name, slice(3, 41), slice(5, 49))
            assert part.flags.c_contiguous
            assert np.array_equal(part, expected[3:41, 5:49])


@pytest.mark.parametrize("kind", KINDS)
def test_odd_rows_and_a_last_group_that_is_not_full(tmp_path: Path, kind: str) -> None:
    """moe.cc pads each row of the symmetric q4 to whole bytes, and packs the other one without regard to rows."""
    model = replace(MODEL, expert_hidden=9)
    write_qw3w(tmp_path / "all.bin", model)
    records, expected = [], {}
    for name, weights in model.tensors().items():
        parts, expected[name] = [(name, 0, weights)], weights
        if name.endswith("down_proj.weight"):
            parts, expected[name] = quantized(name, weights, kind, 64)
            if kind == "q4z":
                halves = parts[1][2]
                codes = np.stack((halves & 15, halves >> 4), axis=-1).reshape(64, 10)[:, :9]
                flat = packed(codes.reshape(1, -1))[0]
                parts[1] = (parts[1][0], 3, np.pad(flat, (0, 64 * 5 - len(flat))).reshape(64, 5))
        records += [record(part, dtype, array, 64 if len(parts) > 1 else 0) for part, dtype, array in parts]
    (tmp_path / "all.bin").write_bytes(file_bytes(records, 2))
    checkpoint = open_source(tmp_path / "all.bin")
    for layer in range(model.layers):
        for expert in range(model.experts):
            name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
            found = checkpoint.read(f"layers.{layer}.experts.{expert}.down", slice(5, 60))
            assert np.array_equal(found, expected[name][5:60])


def test_tied_embeddings_and_an_lm_head_that_differs(tmp_path: Path) -> None:
    write_qw3w(tmp_path / "all.bin", replace(MODEL, tied=True))
    tied = open_source(tmp_path / "all.bin")
    assert tied.config.tied_embeddings
    assert np.array_equal(tied.read("lm_head"), tied.read("embedding"))
    whole = (tmp_path / "all.bin").read_bytes()
    table = tied.read("embedding")
    (tmp_path / "all.bin").write_bytes(whole + record("lm_head.weight", 0, table, 0))
    assert open_source(tmp_path / "all.bin").config.tied_embeddings
    (tmp_path / "all.bin").write_bytes(whole + record("lm_head.weight", 0, table + 1, 0))
    assert not open_source(tmp_path / "all.bin").config.tied_embeddings


def test_another_file_or_config_has_another_fingerprint(tmp_path: Path) -> None:
    prints = []
    for seed, kind in ((1, ""), (2, ""), (1, "q8"), (1, "q4"), (1, "q4z")):
        write_qw3w(tmp_path / "all.bin", replace(MODEL, seed=seed), kind, 32)
        prints.append(open_source(tmp_path / "all.bin").fingerprint())
        assert open_source(tmp_path / "all.bin").fingerprint() == prints[-1]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 1e7}))
    prints.append(open_source(tmp_path / "all.bin").fingerprint())
    assert len(set(prints)) == len(prints)


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_truncated_files(tmp_path: Path) -> None:
    write_qw3w(tmp_path / "all.bin", kind="q4", group=32)
    whole = (tmp_path / "all.bin").read_bytes()
    assert f"the file has {len(whole) - 1} bytes (truncated?)" in refusal(tmp_path / "m", whole[:-1])
    assert "it has 9 bytes, too few for a header" in refusal(tmp_path / "m", whole[:9])
    cut = refusal(tmp_path / "m", whole[: whole.index(b"lm_head.weight") - 4])
    assert cut.startswith("tensor model.layers.0.input_layernorm.weight is missing (43 of 45 are); export the whole")
    assert "expected b'QW3W\\x00\\x01' or version 2" in refusal(tmp_path / "m", whole[:5] + b"\x03" + whole[6:])


RECORDS = {
    "a long name": (b"\xff\xff\xff\xff", "at byte 10 a name of 4294967295 bytes begins"),
    "no text": (struct.pack("<I", 2) + b"\xff\xfe" + bytes(8), "the name at byte 10 is no UTF-8 text"),
    "a strange name": (struct.pack("<I", 2) + b"a\n" + bytes(8), r"the name at byte 10 is 'a\n'"),
    "dtype": (record("a", 4, np.ones(1, np.float32), 0), "a has dtype 4 and 1 dimensions"),
    "scalar": (record("a", 0, np.float32(1), 0), "a has dtype 0 and 0 dimensions"),
    "empty": (record("a", 0, np.ones((2, 0), np.float32), 0), "a has shape [2, 0]"),
    "huge": (struct.pack("<I1s6I", 1, b"a", 0, 4, *[2**32 - 1] * 4), "a ends at byte"),
    "twice": (record("a", 0, np.ones(1, np.float32), 0) * 2, "it has a twice"),
    "integers": (record("a", 2, np.ones(1, np.int8), 0), "a has integers, but is neither .q8 nor .q4"),
    "no scale": (record("a.q8", 2, np.ones((1, 1), np.int8), 0), "a.q8 has no a.scale"),
    "a lone zero": (record("a.zero_point", 2, np.ones(1, np.int8), 0), "a.zero_point has integers"),
    "forms": (
        record("a.q8", 2, np.ones((1, 1), np.int8), 0)
        + record("a", 0, np.ones((1, 1), np.float32), 0)
        + record("a.scale", 0, np.ones(1, np.float32), 0),
        "it has a in two forms",
    ),
    "half a scale": (
        record("a.q8", 2, np.ones((1, 1), np.int8), 0) + record("a.scale", 1, np.ones(1, np.float16), 0),
        "a.scale has dtype 1 and 1 dimensions, expected dtype 0 (float32) and 1",
    ),
    "zero of q8": (
        record("a.q8", 2, np.ones((1, 1), np.int8), 0)
        + record("a.scale", 0, np.ones(1, np.float32), 0)
        + record("a.zero_point", 2, np.ones(1, np.int8), 0),
        "a.q8 has a a.zero_point, as only .q4 may have one",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_damaged_records(tmp_path: Path, case: str) -> None:
    data, expected = RECORDS[case]
    assert expected in refusal(tmp_path / "m", file_bytes([data], 2))


def test_what_does_not_fit_its_config(tmp_path: Path) -> None:
    path = tmp_path / "all.bin"
    write_qw3w(path, kind="q4", group=32)
    whole = path.read_bytes()
    for change, expected in (
        (
            {"moe_intermediate_size": 96},
            "gate_proj.weight has shape [192, 64], but config.json beside it makes it [96, 64]",
        ),
        ({"num_hidden_layers": 1}, "has model.layers.1.input_layernorm.weight (21 such), which is no tensor"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is missing (21 of 66 are)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(MODEL.config_json() | change))
        assert expected in refusal(path, whole)
    (tmp_path / "config.json").unlink()
    assert "there is no config.json beside it: copy config.json and tokenizer.json" in refusal(path, whole)


@pytest.mark.parametrize(
    ("told", "scales", "zeros", "expected"),
    [
        (32, 383, None, "has 383 scales for 192 x 64 weights in groups of 32"),
        (0, 384, None, "has 384 scales for 192 x 64 weights with a scale per row"),
        (None, 385, None, "has 385 scales for 192 x 64 weights in any groups"),
        (32, 384, 383, "has 384 scales, but 383 zero points"),
    ],
)
def test_scales_that_do_not_fit(
    tmp_path: Path, told: int | None, scales: int, zeros: int | None, expected: str
) -> None:
    write_qw3w(tmp_path / "all.bin")
    weights = MODEL.tensors()
    records = [
        record(name, 0, values, 0 if told is not None else None) for name, values in weights.items() if name != MATRIX
    ]
    records.append(record(f"{MATRIX}.scale", 0, np.ones(scales, np.float32), told))
    records.append(record(f"{MATRIX}.q4", 3, np.ones((192, 32), np.uint8), told))
    if zeros is not None:
        records.append(record(f"{MATRIX}.zero_point", 2, np.ones(zeros, np.int8), told))
    found = refusal(tmp_path / "all.bin", file_bytes(records, 1 if told is None else 2))
    assert found == f"tensor {MATRIX} {expected}; copy the file again"
