"""`dist-moe shard ORG/NAME` with a package that stands in for huggingface_hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.checkpoint.hub import is_hub_id
from helpers.tiny_model import TinyModel

# Takes a "hub" directory for the network, and keeps the arguments of each call.
FAKE = """
import fnmatch, os, pathlib, shutil, sys
from huggingface_hub import errors, utils
def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
    here = pathlib.Path(os.environ["FAKE_HUB"])
    with open(here / "calls", "a") as calls:
        print(repo_id, revision, utils.quiet, file=calls)
    if os.environ.get("FAKE_ERROR"):
        exec("raise " + os.environ["FAKE_ERROR"])
    target = here / "cache" / ("models--" + repo_id.replace("/", "--")) / "snapshots" / "0123abc"
    target.mkdir(parents=True, exist_ok=True)
    for path in (here / repo_id).iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
            shutil.copy(path, target)
    return str(target)
"""
ERRORS = """
class HfHubHTTPError(OSError): ...
class RepositoryNotFoundError(HfHubHTTPError): ...
class GatedRepoError(RepositoryNotFoundError): ...
class RevisionNotFoundError(HfHubHTTPError): ...
class LocalEntryNotFoundError(FileNotFoundError, ValueError): ...
class HTTPError(Exception): ...
"""
UTILS = """
quiet = False
def disable_progress_bars():
    global quiet
    quiet = True
"""


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    package = tmp_path / "packages" / "huggingface_hub"
    package.mkdir(parents=True)
    for name, text in (("__init__", FAKE), ("errors", ERRORS), ("utils", UTILS)):
        (package / f"{name}.py").write_text(text)
    TinyModel(layers=1, dense_layers=()).write(tmp_path / "hub" / "org" / "Tiny-2B")
    (tmp_path / "hub" / "org" / "Tiny-2B" / "pytorch_model.bin").write_bytes(b"the weights again")
    (tmp_path / "work").mkdir()
    return tmp_path / "hub"


def dist_moe(hub: Path, *words: str, error: str = "") -> subprocess.CompletedProcess[str]:
    root = hub.parent
    paths = os.pathsep.join([str(root / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "FAKE_HUB": str(hub), "FAKE_ERROR": error}
    command = [sys.executable, "-m", "dist_moe", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root / "work", env=environment)


def test_an_id_is_downloaded_and_packed(hub: Path) -> None:
    done = dist_moe(hub, "shard", "org/Tiny-2B", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "mpirun -n 1 dist-moe run -m Tiny-2B-q4-1"
    assert (hub.parent / "work" / "Tiny-2B-q4-1" / "manifest.json").is_file()
    assert not list((hub / "cache").rglob("pytorch_model.bin"))
    again = dist_moe(hub, "shard", "org/Tiny-2B@v1.0")
    assert "done: a store of these options stands there" in again.stdout
    assert (hub / "calls").read_text() == "org/Tiny-2B None True\norg/Tiny-2B v1.0 False\n"


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (
            "errors.RepositoryNotFoundError('401 Client Error.\\n\\nRepository Not Found')",
            2,
            "(401 Client Error): check",
        ),
        ("errors.GatedRepoError('403 Client Error.')", 2, "or log in with: hf auth login"),
        ("errors.RevisionNotFoundError('404')", 2, "does not give a model of this name and revision (404)"),
        ("errors.LocalEntryNotFoundError('cannot find the requested files')", 2, "(cannot find the requested files)"),
        ("errors.HTTPError('[Errno -3] Temporary failure in name resolution')", 2, "when there is network and room"),
        ("OSError(28, 'No space left on device')", 2, "([Errno 28] No space left on device): repeat the command"),
        ("KeyboardInterrupt", -2, "org/Tiny-2B: interrupted; repeat the same command to continue the download"),
    ],
)
def test_a_failed_download_is_one_sentence(hub: Path, error: str, code: int, expected: str) -> None:
    done = dist_moe(hub, "shard", "org/Tiny-2B", error=error)
    assert done.returncode == code  # -2: ended by SIGINT, which shells report as 130
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((hub.parent / "work").iterdir())


def test_without_the_package(hub: Path) -> None:
    (hub.parent / "packages" / "huggingface_hub" / "__init__.py").write_text("raise ImportError('broken')")
    done = dist_moe(hub, "shard", "org/Tiny-2B")
    assert done.returncode == 3
    assert "downloading a model needs the package huggingface_hub: pip install 'dist-moe[hub]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_run_says_how_to_get_it(hub: Path) -> None:
    done = dist_moe(hub, "run", "-m", "org/Tiny-2B", "-p", "x")
    assert done.returncode == 2
    assert "but it does not exist; dist-moe shard org/Tiny-2B downloads and packs a model of the Hug" in done.stderr


def test_paths_are_no_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("Qwen/Qwen3-30B-A3B", "a/b@main"):
        assert is_hub_id(source)
    for source in ("model", "/models/qwen", "./models/qwen", "a/b/c", "../x", "a/b/", "a/.b", "a b/c"):
        assert not is_hub_id(source)
    (tmp_path / "models").mkdir()
    assert not is_hub_id("models/qwen")
