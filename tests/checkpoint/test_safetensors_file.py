"""safetensors files: zero-copy views, what is refused and how, and the header that the store writes."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dist_moe.checkpoint.safetensors_file import SafetensorsFile, file_layout, header_bytes
from dist_moe.errors import CheckpointError

ARRAYS = {
    "odd": np.arange(7, dtype=np.uint8),
    "half": np.linspace(-2, 2, 15, dtype=np.float16).reshape(3, 5),
    "single": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "double": np.arange(3, dtype=np.float64),
    "long": np.arange(5, dtype=np.uint64) << 40,
    "empty": np.empty((0, 4), np.float32),
    "scalar": np.array(5, np.int64),
}
DTYPES = {"odd": "U8", "half": "F16", "single": "F32", "double": "F64", "long": "U64", "empty": "F32", "scalar": "I64"}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file that the library wrote."""
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path, {"format": "np", "note": "ä"})
    return path


def refusal(path: Path) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    return str(caught.value).replace(str(path), "FILE")


def test_reads_what_the_library_wrote(written: Path) -> None:
    file = SafetensorsFile(written)
    assert sorted(file.names()) == sorted(ARRAYS)
    assert file.metadata == {"format": "np", "note": "ä"}
    assert file.file_bytes == written.stat().st_size
    assert file.tensor_bytes == sum(array.nbytes for array in ARRAYS.values())
    for name, array in ARRAYS.items():
        assert file.dtype(name) == DTYPES[name]
        assert file.shape(name) == array.shape
        assert file.raw(name).dtype == array.dtype
        assert np.array_equal(file.raw(name), array)


def test_views_are_of_the_mapped_file_and_outlive_it(written: Path) -> None:
    view = SafetensorsFile(written).raw("single")
    base = view
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    assert not view.flags.writeable
    assert np.array_equal(view, ARRAYS["single"])


def test_bf16_and_8_bit_floats_are_bits(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        "f": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [4, 7]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes([0x80, 0x3F, 1, 2, 3, 4, 5]))
    file = SafetensorsFile(path)
    assert file.raw("b").tolist() == [0x3F80, 0x0201]
    assert file.raw("f").tolist() == [3, 4, 5]


def test_unknown_tensor(written: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(written).raw("nothing")
    assert str(caught.value) == f"{written}: has no tensor nothing (it has 7 others); copy or download the file again"


@pytest.mark.parametrize("kept", [0, 3, 8, 9, 40, -200, -1])
def test_truncated(written: Path, kept: int) -> None:
    whole = written.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    content = whole[:kept]
    written.write_bytes(content)
    expected = next(end for end in (8, header_end, len(whole)) if len(content) < end)
    again = "copy or download the file again"
    assert refusal(written) == f"FILE: truncated: expected at least {expected} bytes, actual {len(content)}; {again}"


def test_longer_than_its_tensors(written: Path) -> None:
    size = written.stat().st_size
    written.write_bytes(written.read_bytes() + b"xyz")
    assert refusal(written) == f"FILE: expected {size} bytes, actual {size + 3}; copy or download the file again"


@pytest.mark.parametrize("flipped", [6, 8, 20])
def test_damaged_headers(written: Path, flipped: int) -> None:
    content = bytearray(written.read_bytes())
    content[flipped] ^= 0x80
    written.write_bytes(content)
    sentence = refusal(written)
    assert sentence.startswith("FILE: expected a safetensors file, but its header is damaged (")
    assert sentence.endswith("); copy or download the file again")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
        {"a": 5},
        [],
    ],
)
def test_headers_that_do_not_describe_the_file(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert refusal(path).startswith("FILE: expected ")


def test_a_name_of_two_lines_stays_in_one_sentence(tmp_path: Path) -> None:
    text = json.dumps({"a\nb": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    again = "copy or download the file again"
    assert refusal(path) == f"FILE: expected a safetensors file, but a tensor is called 'a\\nb'; {again}"


def test_not_a_file(tmp_path: Path) -> None:
    sentence = "FILE: expected a safetensors file, but there is none; copy or download the file again"
    assert refusal(tmp_path / "nothing.safetensors") == sentence
    assert refusal(tmp_path) == sentence


LAYOUT = {
    "a": ("U8", (64,)),
    "b": ("F32", (3, 5)),
    "c": ("BF16", (7,)),
    "none": ("F32", (0,)),
    "d": ("U64", (2,)),
    "last": ("F16", (1,)),
}


def test_layout_is_aligned_and_the_library_reads_it(tmp_path: Path) -> None:
    layout = file_layout({name: spec for name, spec in LAYOUT.items() if name != "c"}, {"format_version": "1"})
    assert len(layout.header) % 64 == 0
    content = bytearray(layout.file_bytes)
    content[: len(layout.header)] = layout.header
    values = {
        "a": np.arange(64, dtype=np.uint8),
        "b": np.arange(15, dtype=np.float32).reshape(3, 5),
        "none": np.empty(0, np.float32),
        "d": np.array([3, 4], np.uint64),
        "last": np.array([0.5], np.float16),
    }
    for name, array in values.items():
        assert layout.first_byte[name] % 64 == 0
        content[layout.first_byte[name] : layout.first_byte[name] + array.nbytes] = array.tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    loaded = load_file(path)
    file = SafetensorsFile(path)
    assert file.names() == list(values)
    assert file.metadata == {"format_version": "1"}
    assert file.tensor_bytes == sum(array.nbytes for array in values.values())
    for name, array in values.items():
        assert np.array_equal(loaded[name], array)
        assert np.array_equal(file.raw(name), array)
        assert file.raw(name).ctypes.data % 64 == 0 or array.size == 0


def test_layout_of_bf16_and_of_other_alignments() -> None:
    layout = file_layout(LAYOUT, {}, alignment=4096)
    assert len(layout.header) % 4096 == 0
    assert [layout.first_byte[name] - len(layout.header) for name in LAYOUT] == [0, 4096, 8192, 12288, 12288, 16384]
    assert header_bytes(LAYOUT, {}, alignment=4096) == layout.header
    assert len(header_bytes({}, {})) == 64
