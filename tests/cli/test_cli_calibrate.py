"""`dist-moe calibrate`: the same bytes on any ranks, merging, coverage, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dist_moe.checkpoint.safetensors_file import SafetensorsFile
from dist_moe.cli.main import execute
from dist_moe.errors import DistMoeError, UsageError
from dist_moe.store.calibration_file import read_calibration, write_calibration
from helpers.launching import Finished

PROGRAM = (sys.executable, "-m", "dist_moe")
MpiRun = Callable[..., Finished]
END = "<|endoftext|>"
STORIES = f"Once upon a time there was a dog.{END}A cat had a red hat. It was lost, and Mia was sad.{END}"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(STORIES)
    return path


@pytest.fixture
def calibrate(text: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, *arguments: str) -> Path:
        execute(["calibrate", str(text), "-o", str(tmp_path / name), *arguments])
        return tmp_path / name

    return run


@pytest.mark.parametrize("quant", ["bf16", "q4"])
def test_the_same_bytes_on_any_ranks(mpirun: MpiRun, calibrate, text: Path, tmp_path: Path, quant: str) -> None:
    alone = calibrate("alone", "--quant", quant, "--split", END).read_bytes()
    runs = [(2, "sliced", "3"), (3, "shared", "256")] if quant == "q4" else [(3, "whole", "11")]
    for ranks, experts, chunk in runs:
        there = tmp_path / f"{ranks}"
        options = ["--quant", quant, "--split", END, "--experts", experts, "--prefill-chunk", chunk]
        mpirun(ranks, *PROGRAM, "calibrate", str(text), "-o", str(there), *options)
        assert there.read_bytes() == alone, (ranks, experts)


def test_coverage_names_experts(calibrate, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_calibration(calibrate("found", "--quant", "q8"))
    said = capsys.readouterr().err
    unrouted = [(layer, moments.unrouted) for layer, moments in enumerate(found.layers) if moments.unrouted]
    assert unrouted, "a short text cannot reach all experts"
    for layer, experts in unrouted:
        assert f"layer {layer}: never routed: expert" in said
        assert all(not found.layers[layer].tokens_E[expert] for expert in experts)
    assert f"{found.tokens} tokens of text.txt" in said
    assert all(moments.tokens_E.sum() == 4 * found.tokens for moments in found.layers)


def test_merging_is_the_same_in_any_order(calibrate, tmp_path: Path) -> None:
    parts = [calibrate("one", "--quant", "q8"), calibrate("two", "--quant", "q8", "--window", "5")]
    parts.append(calibrate("three", "--quant", "q8", "--window", "9"))
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0)]
    merged = []
    for number, order in enumerate(orders):
        output = tmp_path / f"merged{number}"
        execute(["calibrate", "--merge", *(str(parts[index]) for index in order), "-o", str(output)])
        merged.append(output.read_bytes())
    assert merged[0] == merged[1] == merged[2]
    read = read_calibration(tmp_path / "merged0")
    assert read.tokens == sum(read_calibration(part).tokens for part in parts)
    assert np.array_equal(read.layers[1].tokens_E, sum(read_calibration(part).layers[1].tokens_E for part in parts))


def test_one_calibration_is_merged_once(calibrate, tmp_path: Path) -> None:
    one = calibrate("one", "--quant", "q8")
    with pytest.raises(UsageError, match="holds the same as"):
        execute(["calibrate", "--merge", str(one), str(one), "-o", str(tmp_path / "out")])


def test_outputs_are_replaced_only_by_force(calibrate) -> None:
    output = calibrate("out", "--quant", "q8", "--window", "5")
    with pytest.raises(DistMoeError, match="is there already: name another file, or replace it with --force"):
        calibrate("out", "--quant", "q8")
    before = output.read_bytes()
    assert calibrate("out", "--quant", "q8", "--force").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--exchange", "alltoall"), "--exchange alltoall: calibrate needs all tokens on all ranks"),
        (("--window", "999999999"), "--window 999999999 is more than the model's maximum"),
        (("-o", "/nowhere/at/all"), "cannot be written"),
        (("--merge",), "expected a calibration, but it is none, or damaged"),
    ],
)
def test_refusals(text: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(DistMoeError, match=said):
        execute(["calibrate", str(text), "-o", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_the_text_is_not_overwritten(text: Path) -> None:
    with pytest.raises(DistMoeError, match="would be lost"):
        execute(["calibrate", str(text), "-o", str(text), "--force"])
    assert text.read_text() == STORIES


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(DistMoeError, match="holds no text"):
        execute(["calibrate", str(tmp_path / "empty"), "-o", str(tmp_path / "out")])


class TestFiles:
    """Files that are no calibration, or one that is damaged."""

    @pytest.fixture
    def whole(self, calibrate) -> Path:
        return calibrate("whole", "--quant", "q8")

    def test_reading_gives_what_was_written(self, whole: Path, tmp_path: Path) -> None:
        write_calibration(tmp_path / "again", read_calibration(whole))
        assert (tmp_path / "again").read_bytes() == whole.read_bytes()

    def test_every_flipped_byte_of_the_sums_is_noticed(self, whole: Path) -> None:
        data = bytearray(whole.read_bytes())
        for place in range(len(data) - 8 * 128, len(data), 97):
            data[place] ^= 1
            whole.write_bytes(data)
            with pytest.raises(UsageError, match="the calibration is damaged"):
                read_calibration(whole)
            data[place] ^= 1

    def test_a_truncated_file_is_refused(self, whole: Path) -> None:
        whole.write_bytes(whole.read_bytes()[:-100])
        with pytest.raises(UsageError, match=r"damaged .*truncated"):
            read_calibration(whole)

    def test_other_safetensors_files_are_refused(self, tmp_path: Path) -> None:
        save_file({"x": np.zeros(3)}, tmp_path / "other")
        with pytest.raises(UsageError, match="a safetensors file, but not a calibration"):
            read_calibration(tmp_path / "other")

    def test_another_version_is_refused(self, whole: Path, tmp_path: Path) -> None:
        metadata = {**SafetensorsFile(whole).metadata, "format_version": "9"}
        save_file(load_file(whole), tmp_path / "other", metadata)
        with pytest.raises(UsageError, match="a calibration of version '9', expected 1"):
            read_calibration(tmp_path / "other")

    @pytest.mark.parametrize("texts", ["[" * 100_000, "{", "7"])
    def test_texts_that_are_no_list_are_refused(self, whole: Path, texts: str) -> None:
        data = whole.read_bytes()
        stop = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:stop])
        header["__metadata__"]["texts"] = texts
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        whole.write_bytes(len(text).to_bytes(8, "little") + text + data[stop:])
        with pytest.raises(UsageError, match=r"the calibration is damaged \((?!its checksum)"):
            read_calibration(whole)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="there is no such file: make one with dist-moe calibrate"):
            read_calibration(tmp_path / "none")


def test_sensitivity_of_what_is_rounded_already_is_refused(calibrate) -> None:
    with pytest.raises(DistMoeError, match=r"has matrices in q4 already.*take a store in bf16"):
        calibrate("never", "--quant", "q4", "--sensitivity", "8")


def test_merging_reads_no_text(calibrate, tmp_path: Path) -> None:
    made = str(calibrate("one", "--quant", "bf16"))
    with pytest.raises(UsageError, match="leave --window out"):
        execute(["calibrate", "--merge", made, "-o", str(tmp_path / "two"), "--window", "5"])
