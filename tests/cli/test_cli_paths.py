"""Names of files: empty, closed or too long ones, devices, pipes and byte order marks, each in one sentence."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dist_moe import files
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli import text_files
from dist_moe.cli.main import execute
from dist_moe.cli.models import find_model
from dist_moe.cli.prompt import read_prompt
from dist_moe.cli.token_ids import read_ids
from dist_moe.demo import demo_model_directory
from dist_moe.errors import UsageError
from dist_moe.files import require_writable
from dist_moe.parallel.launcher import Launcher
from dist_moe.parallel.world import AgreedError
from dist_moe.store.inspection import inspect_path
from dist_moe.store.reader import Store
from dist_moe.text.tokenizer import Tokenizer
from helpers.command_options import MODEL, RUN


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo_model_directory())


def prompt_of(path: Path, tokenizer: Tokenizer) -> str:
    return read_prompt(replace(RUN, prompt_file=str(path)), tokenizer, tokenizer.size, Launcher()).text


# ---- what the system refuses to tell ----


@pytest.fixture(params=["closed", "long"])
def hidden(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path of which the system does not tell what it is; for root no directory is closed."""
    if request.param == "long":
        return tmp_path / ("x" * 300)
    real, closed = os.stat, tmp_path / "closed"

    def refusing(path: object, **more: object) -> os.stat_result:
        if isinstance(path, (str, Path)) and str(path).startswith(str(closed) + "/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, **more)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "stat", refusing)
    return closed / "x"


def test_a_path_that_cannot_be_looked_at_is_one_sentence(hidden: Path) -> None:
    attempts = [
        lambda: require_writable(hidden),
        lambda: find_model(replace(MODEL, model=str(hidden))),
        lambda: read_ids(str(hidden), "--ids"),
        lambda: Checkpoint.open(hidden),
        lambda: Store.open(hidden),
        lambda: inspect_path(hidden),
        lambda: execute(["shard", str(hidden)]),
        lambda: execute(["inspect", str(hidden)]),
    ]
    for attempt in attempts:
        with pytest.raises(UsageError, match=r"cannot be looked at \((Permission denied|File name too long)\)"):
            attempt()


def test_a_prompt_file_that_cannot_be_looked_at_is_one_sentence(hidden: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"--prompt-file: .* cannot be read: (Permission denied|File name too long)"):
        prompt_of(hidden, tokenizer)


def test_what_stands_at_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "circle").symlink_to("circle")
    assert [files.kind_of(tmp_path / name) for name in ("file", "link", ".", "none", "file/x")] == [
        "file", "file", "directory", None, None,
    ]  # fmt: skip
    os.mkfifo(tmp_path / "pipe")
    assert files.kind_of(tmp_path / "pipe") == "pipe"
    assert files.kind_of(Path("/dev/null")) == "other"
    with pytest.raises(UsageError, match="cannot be looked at"):
        files.kind_of(tmp_path / "circle")
    with pytest.raises(UsageError, match="cannot be looked at"):
        require_writable(tmp_path / "circle")


# ---- empty names ----

EMPTY = [
    (("run", "-p", "a", "-m", ""), "--model"),
    (("run", "--prompt-file", ""), "--prompt-file"),
    (("run", "-p", "a", "--logits", ""), "--logits"),
    (("run", "-p", "a", "--log-file", ""), "--log-file"),
    (("run", "-p", "a", "--config", ""), "--config"),
    (("logits", "--ids", "", "-o", "x.npy"), "--ids"),
    (("logits", "--ids", "1", "-o", ""), "--output"),
    (("shard", ""), "SRC"),
    (("shard", "-o", ""), "--output"),
    (("inspect", ""), "STORE|SHARD"),
]


@pytest.mark.parametrize(("arguments", "name"), EMPTY)
def test_an_empty_name_is_refused(
    arguments: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        execute(arguments)
    assert str(caught.value).startswith(f"{name}: expected ")
    assert "found an empty text" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_root_directory_is_no_npy_file() -> None:
    with pytest.raises(UsageError, match=r"^/ is a directory: name a file"):
        require_writable(Path("/"))


# ---- prompts ----


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_prompt(name: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=f"--prompt-file: {name} is a device: give a file or a pipe"):
        prompt_of(Path(name), tokenizer)


def test_a_directory_is_no_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        prompt_of(tmp_path, tokenizer)


def test_a_pipe_is_a_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("Once upon\n",))
    writer.start()
    assert prompt_of(pipe, tokenizer) == "Once upon"
    writer.join()


def test_a_prompt_has_an_end(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_files.LARGEST_TEXT_BYTES == 64 << 20
    monkeypatch.setattr(text_files, "LARGEST_TEXT_BYTES", 1 << 20)
    path = tmp_path / "long.txt"
    path.write_bytes(b"x" * (1 << 20))
    assert len(text_files.read_text(path, "--prompt-file")) == 1 << 20
    path.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(UsageError, match=r"--prompt-file: .*long\.txt has more than 1 MB of text"):
        prompt_of(path, tokenizer)


def test_a_byte_order_mark_is_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "prompt.txt").write_text("Once\n", encoding="utf-8-sig")
    assert prompt_of(tmp_path / "prompt.txt", tokenizer) == "Once"
    (tmp_path / "ids.txt").write_text("1 2", encoding="utf-8-sig")
    assert read_ids(str(tmp_path / "ids.txt"), "--ids") == [1, 2]


def test_files_of_ids_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"1 2\xff")
    with pytest.raises(UsageError, match=r"--ids: .*bad\.txt: not valid UTF-8 at byte 3"):
        read_ids(str(tmp_path / "bad.txt"), "--ids")
    for content in (b"", b"PK\x03\x04 no archive", b"\x93NUMPY"):
        (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.npy: not a file of token ids"):
            read_ids(str(tmp_path / "bad.npy"), "--ids")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--trace", "out", "--logits", "./out"), "--logits and --trace both write out: give each a file of its own"),
        (("--trace", "{model}/manifest.json"), "is a file of the model, which would be lost"),
        (("--routing", "link"), "is a file of the model, which would be lost"),
        (("--logits", "link"), "is a file of the model, which would be lost"),
    ],
)
def test_an_output_overwrites_neither_another_one_nor_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    model = tmp_path / "store"
    execute(["shard", str(demo_model_directory()), "-o", str(model)])
    manifest = (model / "manifest.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(model / "manifest.json")
    with pytest.raises(AgreedError, match=said):
        execute(["run", "-m", str(model), "-p", "Once", "-n", "1", *(option.format(model=model) for option in options)])
    assert (model / "manifest.json").read_bytes() == manifest
    assert not Path("out").exists()
