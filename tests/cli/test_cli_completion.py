"""Shell completion: the scripts, and what they get from the program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.cli.main import COMMANDS, execute
from dist_moe.errors import UsageError

PROGRAM = (sys.executable, "-m", "dist_moe")


def complete(words: str, env: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """What bash gets for a line whose last word is being typed: (kind, value) each."""
    variables = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_DIST_MOE_COMPLETE": "bash_complete"}
    done = subprocess.run(
        PROGRAM, env=os.environ | variables | (env or {}), capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return [tuple(line.split(",", 1)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_and_how_to_install_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    execute(["completion", shell])
    script = capsys.readouterr().out
    assert f"_DIST_MOE_COMPLETE={shell}_complete" in script
    last = script.splitlines()[-1]
    assert last.startswith("# To install, ")
    assert f"dist-moe completion {shell}" in last
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)


def test_other_shells_are_refused() -> None:
    with pytest.raises(UsageError, match="expected bash, zsh or fish, found 'csh'"):
        execute(["completion", "csh"])


def test_commands_complete_without_being_imported() -> None:
    assert complete("dist-moe ") == [("plain", name) for name in COMMANDS]
    assert complete("dist-moe ro") == [("plain", "routing")]
    program = (
        "import os, sys\n"
        "from dist_moe.cli import main\n"
        "main.execute([])\n"
        "print([name for name in main.COMMANDS if f'dist_moe.cli.{name}' in sys.modules])\n"
    )
    variables = {"COMP_WORDS": "dist-moe ", "COMP_CWORD": "1", "_DIST_MOE_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_options_choices_and_files_complete(tmp_path: Path) -> None:
    assert ("plain", "--debug") in complete("dist-moe run --de")
    assert complete("dist-moe run --kv ") == [("plain", kv) for kv in ("f32", "f16", "q8")]
    assert complete("dist-moe run --debug t") == [("plain", "timing")]
    assert complete("dist-moe run -m some") == [("file", "some")]
    assert complete("dist-moe completion z") == [("plain", "zsh")]
    assert complete("dist-moe cache ") == [("plain", "ls"), ("plain", "rm")]
    assert complete("dist-moe --v") == [("plain", "--version")]
    # A line that could not run still completes.
    assert complete("dist-moe run --config nowhere --max-tokens x --kv f1") == [("plain", "f16")]
    model = tmp_path / "tiny-text-0123456789ab"
    model.mkdir()
    assert complete("dist-moe cache rm t", {"DIST_MOE_CACHE": str(tmp_path)}) == [("plain", model.name)]
