"""`dist-moe chat` without a terminal: from pipes, under mpirun, and what is refused before any weight is read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.chat.connection import VARIABLE, Listener
from dist_moe.chat.protocol import Generate, Piece, Ready
from helpers import launching
from helpers.launching import flavour

CHAT = (sys.executable, "-m", "dist_moe", "chat")
QUICK = ("--threads", "1", "--temperature", "0", "-n", "8")
LINES = "Hello\n/undo\n/undo\nTell me a \\\nstory\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path_factory.getbasetemp() / "chat-cache"))


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[int]:
    """A file with the user's lines, open as stdin."""
    path = tmp_path / "lines"
    path.write_text(LINES)
    with path.open() as file:
        yield file.fileno()


def told(finished: launching.Finished) -> list[str]:
    """The lines that are ours: Open MPI adds its own."""
    return [line for line in finished.stderr.splitlines() if line.startswith("dist-moe: ")]


def test_lines_of_a_pipe_give_the_same_answers_on_any_ranks(lines: int) -> None:
    answers = []
    for ranks in ("1", "3"):
        os.lseek(lines, 0, os.SEEK_SET)
        finished = launching.run(*CHAT, *QUICK, "--ranks", ranks, stdin=lines)
        assert finished.code == 0, finished.output
        assert told(finished) == ["dist-moe: error: /undo: there is no message to take back"], finished.output
        answers.append(finished.stdout)
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 2, answers


def test_a_second_turn_computes_what_is_new_alone(tmp_path: Path) -> None:
    story = "Once upon a time a fox met a hen. " * 60
    (tmp_path / "lines").write_text(f"{story}\n/stats\nand then?\n/stats\n")
    with (tmp_path / "lines").open() as file:
        finished = launching.run(*CHAT, *QUICK, "--ranks", "2", "--thinking", "off", stdin=file.fileno())
    assert finished.code == 0, finished.output
    (first, second) = re.findall(r"prompt (\d+) tokens, (\d+) reused, (\d+) computed", finished.stderr)
    assert int(first[2]) > 600, finished.output
    assert int(second[2]) < 60, finished.output
    assert int(second[1]) + int(second[2]) == int(second[0])


@pytest.mark.skipif(flavour() == "openmpi", reason="its mpirun never ends stdin")
def test_under_mpirun_rank_0_reads_the_lines(lines: int) -> None:
    plain = launching.run(*CHAT, *QUICK, stdin=lines)
    os.lseek(lines, 0, os.SEEK_SET)
    finished = launching.mpirun(2, *CHAT, *QUICK, stdin=lines)
    assert finished.code == 0, finished.output
    assert finished.stdout == plain.stdout


@pytest.mark.skipif(flavour() == "mpich", reason="its mpirun ends stdin")
def test_under_open_mpi_the_command_that_works_is_named() -> None:
    finished = launching.mpirun(2, *CHAT, *QUICK)
    assert finished.code == 2, finished.output
    (line,) = told(finished)
    assert line.endswith("use dist-moe chat --ranks 2"), finished.output


def test_ranks_under_a_launcher_are_refused() -> None:
    finished = launching.mpirun(2, *CHAT, "--ranks", "2")
    assert finished.code == 2, finished.output
    (line,) = told(finished)
    assert "leave mpirun out" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--thinking", "maybe"), "--thinking: expected auto, on, off or a number of tokens"),
        (("--thinking", "-1"), "--thinking: expected auto, on, off or a number of tokens"),
        (("--system", "a", "--system-file", "b"), "exclude each other"),
        (("--system-file", "/no/such"), "--system-file: /no/such cannot be read"),
        (("--load", "/no/such"), "--load /no/such: cannot be read"),
        (("--tools", "/no/such"), "--tools /no/such: cannot be read"),
        (("--tools", "TOOLS"), "knows no tool calls"),
        (("--hostfile", "/no/such"), "--hostfile: /no/such cannot be read"),
        (("--ranks", "0"), "--ranks: expected a whole number from 1"),
        (("--ctx", "999999999"), "more than the model's maximum of 131072 positions"),
        (("-m", "/no/such"), "-m /no/such: expected a store"),
        (("-m", "BASE"), "has no chat template"),
        (("--temperature", "-1"), "--temperature: expected a number from 0"),
    ],
)
def test_what_is_refused_before_any_weight_is_read(arguments: tuple[str, str], words: str, tmp_path: Path) -> None:
    if "TOOLS" in arguments:
        arguments = ("--tools", str(tmp_path / "tools.json"))
        Path(arguments[1]).write_text(json.dumps({"name": "weather"}))
    if "BASE" in arguments:
        arguments = ("-m", str(base_model(tmp_path)))
    finished = launching.run(*CHAT, *arguments)
    assert finished.code == 2, finished.output
    (line,) = told(finished) if flavour() == "openmpi" else finished.stderr.splitlines()
    assert line.startswith("dist-moe: error: "), finished.output
    assert words in line, finished.output
    assert finished.stdout == ""


def base_model(directory: Path) -> Path:
    """The demo model as if it had not been trained to chat, and without weights."""
    from dist_moe.demo import demo_model_directory

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((demo_model_directory() / name).read_bytes())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("busy", [False, True])
def test_a_back_end_leaves_in_good_order_when_its_front_end_is_gone(ranks: int, busy: bool, tmp_path: Path) -> None:
    """Here nobody else is there to end it: no guard, and a launcher that waits."""
    listener = Listener(tmp_path)
    slow = [str(Path(launching.__file__).with_name("slow_steps")), launching.child_environment()["PYTHONPATH"]]
    environ = {"PYTHONPATH": os.pathsep.join(slow), "DIST_MOE_TEST_STEP_S": "0.05"}
    process = subprocess.Popen(
        [*([launching.mpirun_path(), "-n", str(ranks)] if ranks > 1 else []), *CHAT, "--threads", "1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=launching.child_environment({VARIABLE: listener.address.to_environment(), **environ}),
        start_new_session=True,
    )
    try:
        line = listener.accept(60)
        assert line is not None
        assert isinstance(line.receive(), Ready)
        if busy:
            line.send(Generate([{"role": "user", "content": "Hello"}], [], "auto", 1))
            assert isinstance(line.receive(), Piece)
        line.close()
        assert process.wait(60) == 0, process.stderr and process.stderr.read()
    finally:
        launching.kill_tree(process)
        listener.close()


def test_a_reader_of_stdout_that_leaves_ends_the_chat(lines: int) -> None:
    process = subprocess.Popen(
        [*CHAT, *QUICK],
        stdin=lines,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=launching.child_environment(),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(60) == 141, stderr
    finally:
        launching.kill_tree(process)
