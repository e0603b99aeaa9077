"""`dist-moe cache`: lists what is packed, and removes that alone."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import click
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli import cache as command
from dist_moe.cli.main import execute
from dist_moe.errors import Interrupted, PlaceError, UsageError
from dist_moe.store.cached import cached_models
from dist_moe.store.lock import store_lock
from dist_moe.store.reader import Store
from helpers import launching
from helpers.tiny_model import TinyModel
from helpers.tiny_store import contents, run_convert

TINY = TinyModel(layers=1, dense_layers=())
STORE, OTHER, TEXT = "tiny-q4-0123456789ab", "tiny-q8-ba9876543210", "tiny-text-00112233aabb"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a whole store, an interrupted one, the texts of a GGUF file, and things that are not ours."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("DIST_MOE_CACHE", str(directory))
    source = Checkpoint.open(TINY.write(tmp_path / "hf"))
    for number, name in enumerate((STORE, OTHER)):
        run_convert(source, directory / name)
        os.utime(directory / name, (0, 1000 + number))
    (directory / OTHER / "manifest.json").rename(directory / OTHER / ".progress.json")
    os.utime(directory / OTHER, (0, 1001))
    (directory / TEXT).mkdir()
    (directory / TEXT / "config.json").write_text("{}")
    os.utime(directory / TEXT, (0, 500))
    for foreign in ("notes", "not-q4-ours", "mine-q4-0123456789ab"):
        (directory / foreign).mkdir()
        (directory / foreign / "a.txt").write_text("mine")
    run_convert(source, tmp_path / "elsewhere")
    (directory / "link-q4-0123456789ab").symlink_to(tmp_path / "elsewhere")
    return directory


def names(cache: Path) -> set[str]:
    return {model.name for model in cached_models(cache)}


def test_models_are_listed_last_used_first(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(["cache", "ls", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["directory"] == str(cache)
    models = found["models"]
    listed = [(model["name"], model["format"], model["state"], model["source"]) for model in models]
    assert listed == [
        (OTHER, "q8", "incomplete", "hf"),
        (STORE, "q4", "complete", "hf"),
        (TEXT, "text", "complete", "tiny"),
    ]
    assert models[1]["bytes"] == sum(len(data) for data in contents(cache / STORE).values())
    assert models[1]["used_s"] == 1000
    execute(["cache", "ls"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", OTHER, STORE, TEXT, f"{cache}:"]
    (cache / STORE / "common.safetensors").unlink()
    assert next(model for model in cached_models(cache) if model.name == STORE).state == "damaged"


def test_an_absent_cache_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "none"))
    execute(["cache", "ls"])
    execute(["cache", "rm", "--all", "--yes"])
    assert capsys.readouterr().out == f"{tmp_path / 'none'}: no packed models\n" * 2
    assert not (tmp_path / "none").exists()


def test_one_is_removed_and_nothing_else(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(["cache", "rm", STORE, "--yes"])
    assert capsys.readouterr().out.startswith(f"removed {STORE}, ")
    assert names(cache) == {OTHER, TEXT}
    assert not (cache / STORE).exists()


def test_all_are_ours_alone(cache: Path, tmp_path: Path) -> None:
    before = contents(tmp_path / "elsewhere")
    execute(["cache", "rm", "--all", "--yes"])
    left = {path.name for path in cache.iterdir()}
    assert left == {"notes", "not-q4-ours", "mine-q4-0123456789ab", "link-q4-0123456789ab"}
    assert contents(tmp_path / "elsewhere") == before


@pytest.mark.parametrize(
    "name", ["../elsewhere", "notes", "mine-q4-0123456789ab", "link-q4-0123456789ab", ".", "tiny-q4-*"]
)
def test_what_is_not_listed_cannot_be_removed(name: str, cache: Path, tmp_path: Path) -> None:
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="holds no packed model called"):
        execute(["cache", "rm", name, "--yes"])
    assert contents(tmp_path / "elsewhere") == before
    assert len(list(cache.iterdir())) == 7


def test_foreign_files_in_a_model_stay(cache: Path) -> None:
    (cache / STORE / "notes.txt").write_text("mine")
    with pytest.raises(PlaceError, match=r"the directory is not: it also holds notes\.txt"):
        execute(["cache", "rm", STORE, "--yes"])
    assert [path.name for path in (cache / STORE).iterdir()] == ["notes.txt"]


def test_a_model_in_use_stays_and_the_others_go(cache: Path) -> None:
    store = Store.open(cache / STORE)
    with pytest.raises(PlaceError, match=f"{STORE}: a run is using this store"):
        execute(["cache", "rm", "--all", "--yes"])
    assert names(cache) == {STORE}
    before = contents(cache / STORE)
    Store.open(cache / STORE)
    assert contents(cache / STORE) == before
    del store
    execute(["cache", "rm", STORE, "--yes"])
    assert names(cache) == set()


def test_a_model_that_is_being_written_stays(cache: Path) -> None:
    with store_lock(cache / OTHER, None), pytest.raises(PlaceError, match="another process is writing this store"):
        execute(["cache", "rm", OTHER, "--yes"])
    assert OTHER in names(cache)


def test_a_running_job_keeps_its_model(tmp_path: Path) -> None:
    environment = {"DIST_MOE_CACHE": str(tmp_path), "DIST_MOE_THREADS": "1"}
    program = (
        "import sys\nfrom dist_moe.cli import run\nfrom dist_moe.cli.main import execute\n"
        "generate = run.RunTask._generate\n"
        "def remove_first(task, engine):\n"
        "    import subprocess\n"
        "    line = [sys.executable, '-m', 'dist_moe', 'cache', 'rm', '--all', '--yes']\n"
        "    done = subprocess.run(line, capture_output=True, text=True)\n"
        "    print(done.returncode, done.stderr)\n"
        "    return generate(task, engine)\n"
        "run.RunTask._generate = remove_first\n"
        "sys.exit(execute(['run', '-p', 'Once', '-n', '2', '--quiet']))\n"
    )
    done = launching.run(sys.executable, "-c", program, env=environment)
    assert done.code == 0, done.output
    assert done.stdout.startswith("2 dist-moe: error: ")
    assert "a run is using this store" in done.stdout
    assert [model.state for model in cached_models(tmp_path)] == ["complete"]


def test_a_use_is_noted(tmp_path: Path) -> None:
    environment = {"DIST_MOE_CACHE": str(tmp_path), "DIST_MOE_THREADS": "1"}
    line = (sys.executable, "-m", "dist_moe", "run", "-p", "Once", "-n", "1")
    assert launching.run(*line, env=environment).code == 0
    (model,) = cached_models(tmp_path)
    os.utime(tmp_path / model.name, (0, 1000))
    assert launching.run(*line, env=environment).code == 0
    assert cached_models(tmp_path)[0].used_s > 1000


# ---- asking ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("n\n", False), ("", False)])
def test_it_asks_first(answer: str, removed: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def confirm(text: str, err: bool) -> bool:
        assert text.startswith("remove 1 packed model, ")
        assert err
        if not answer:
            raise click.Abort
        return answer == "y\n"

    monkeypatch.setattr(command.sys, "stdin", Terminal())
    monkeypatch.setattr(command.click, "confirm", confirm)
    if removed:
        execute(["cache", "rm", STORE])
    else:
        with pytest.raises(Interrupted, match="nothing was removed"):
            execute(["cache", "rm", STORE])
    assert (STORE in names(cache)) is not removed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rm"], "say which models to remove"),
        (["rm", "--all", STORE], "say which models to remove"),
        (["rm", STORE], "add --yes"),
        (["rm", "--all"], "add --yes"),
        (["rn"], "No such command 'rn'"),
    ],
)
def test_bad_use_is_one_line(arguments: list[str], words: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(UsageError, match=words) as caught:
        execute(["cache", *arguments])
    assert len(str(caught.value).splitlines()) == 1
    assert names(cache) == {STORE, OTHER, TEXT}
