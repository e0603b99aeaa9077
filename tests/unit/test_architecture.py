"""Imports go one way, each dependency has one door, and files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dist_moe"

# A folder may import the folders named after it (and itself, and the top-level modules).
ALLOWED = {
    "cli": {"chat", "verify", "engine", "text", "store", "checkpoint", "parallel", "kernels", "demo", "model"},
    "verify": {"engine", "model", "parallel", "kernels", "store", "checkpoint"},
    "chat": {"engine", "text", "parallel"},
    "engine": {"model", "parallel", "kernels", "store", "text"},
    "model": {"kernels", "parallel", "store"},
    "store": {"checkpoint", "kernels", "demo"},
    "checkpoint": set(),
    "kernels": set(),
    "parallel": set(),
    "text": set(),
    "demo": set(),
}
# The same for the folders of the engine; its own modules may import them all, and only they are imported by none.
ALLOWED_IN_ENGINE = {
    "start": set(),
    "routing": set(),
    "examination": {"start"},
    "watch": {"start"},
    "requests": {"start"},
    "steps": {"calibration", "requests", "start", "watch"},
    "measuring": {"requests", "start", "steps"},
    "planning": {"measuring", "routing", "start"},
    "calibration": {"start"},
}
DOORS = {
    "mpi4py": {"parallel"},
    "cffi": {"kernels/build.py"},
    "_cffi_backend": {"kernels"},
    "safetensors": {"checkpoint/safetensors_file.py"},
    "tokenizers": {"text"},
    "jinja2": {"text"},
    "click": {"cli"},
    "matplotlib": {"cli/heat_map.py"},
    "gguf": {"checkpoint/gguf_file.py"},
    "huggingface_hub": {"checkpoint/hub.py"},
    "prompt_toolkit": {"chat/terminal.py"},
    "xxhash": {"store/checksum.py"},
}
MAX_LINES = {"dist_moe": 300, "csrc": 350, "tests": 400}


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "dist_moe" or len(parts) < 2 or not (PACKAGE / parts[1]).is_dir():
            continue
        if folder in ALLOWED:
            assert parts[1] == folder or parts[1] in ALLOWED[folder], f"{folder} may not import {name}"
        else:
            assert folder in ("__main__.py", "__init__.py"), f"the top-level module {folder} may not import {name}"


@pytest.mark.parametrize("folder", ALLOWED_IN_ENGINE)
def test_imports_in_the_engine_go_one_way(folder: str) -> None:
    for path in (PACKAGE / "engine" / folder).glob("*.py"):
        for name in imported(path):
            if name.startswith("dist_moe.engine."):
                found = name.split(".")[2]
                assert found == folder or found in ALLOWED_IN_ENGINE[folder], f"{path.name} may not import {name}"


def test_every_folder_of_the_engine_is_known() -> None:
    folders = {path.parent.name for path in (PACKAGE / "engine").glob("*/__init__.py")}
    assert folders == set(ALLOWED_IN_ENGINE)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_dependency_has_one_door(path: Path) -> None:
    relative = str(path.relative_to(PACKAGE))
    for name in imported(path):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or any(relative == door or relative.startswith(door + "/") for door in doors), name


def test_files_can_be_read_in_one_sitting() -> None:
    for folder, limit in MAX_LINES.items():
        for path in (ROOT / folder).rglob("*.[pch]*"):
            if path.suffix in (".py", ".c", ".h") and path.name != "_native.c":
                lines = len(path.read_text().splitlines())
                assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines, more than {limit}"
