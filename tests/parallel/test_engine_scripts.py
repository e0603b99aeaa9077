"""Scripts with an Engine under mpirun: every rank runs the same script, and none is left waiting."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import launching
from helpers.jobs import Job
from helpers.launching import Finished

RANKS = 3
HEAD = """
import os, sys
from dist_moe import Engine, DistMoeError
from dist_moe.errors import UsageError
ONCE = "Once upon a time"
def tell(*words):  # in one write: the ranks share a pipe
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()
def say(*words): tell(engine.is_leader, *words)
"""
Script = Callable[[str], Finished]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture
def script(tmp_path: Path, environment: dict[str, str]) -> Script:
    """Run a script on three ranks."""

    def run(body: str) -> Finished:
        path = tmp_path / "script.py"
        path.write_text(HEAD + body)
        return launching.mpirun(RANKS, sys.executable, str(path), env=environment)

    return run


def lines(done: Finished) -> list[str]:
    return sorted(done.stdout.splitlines())


def test_pieces_come_on_rank_0_and_results_on_all(script: Script) -> None:
    done = script("""
with Engine(threads=1) as engine:
    for piece in engine.generate(ONCE, max_tokens=2):
        say("piece", piece.ids, engine.statistics().decode_tokens, engine.complete(ONCE, max_tokens=1).ids)
    for piece in engine.generate(ONCE, max_tokens=50):
        break
    pairs = list(zip(engine.generate(ONCE, max_tokens=2), engine.generate("A dog", max_tokens=2)))
    result = engine.complete([ONCE, "A dog"], max_tokens=4)
    say("result", [r.ids for r in result], engine.tokenize("Hi"), engine.lead(lambda own: own.is_leader))
    say("pairs", len(pairs), len(engine.logits(ONCE)))
    if result[0].ids[0] > 0:
        say("more", len(engine.complete(ONCE, max_tokens=3).ids))
""")
    assert (done.code, done.stderr) == (0, ""), done.output
    found = lines(done)
    assert [line for line in found if "piece" in line] == [line for line in found if line.startswith("True piece")]
    results = [line.partition("result ")[2] for line in found if "result" in line]
    assert len(results) == RANKS
    assert len({line.rpartition("]")[0] for line in results}) == 1
    assert sorted(line.rpartition("] ")[2] for line in results) == ["None", "None", "True"]
    assert [line for line in found if "pairs" in line] == ["False pairs 0 0", "False pairs 0 0", "True pairs 2 4"]
    assert len([line for line in found if line.endswith("more 3")]) == RANKS


def test_the_bits_are_those_of_one_rank(script: Script, environment: dict[str, str], tmp_path: Path) -> None:
    wishes = "max_tokens=30, temperature=0.9, logprobs=1"
    body = f"with Engine(threads=1) as engine: say(engine.complete([ONCE, 'A dog'], {wishes}))"
    many = script(body)
    alone = launching.run(sys.executable, str(tmp_path / "script.py"), env=environment)
    assert alone.code == many.code == 0, many.output
    assert [line for line in many.stdout.splitlines() if line.startswith("True")] == alone.stdout.splitlines()


@pytest.mark.parametrize(
    "call", ["list(engine.generate(bad))", "engine.complete(bad)", "engine.generate(ONCE, max_tokens=bad)"]
)
def test_a_bad_argument_is_an_error_on_all_ranks(script: Script, call: str) -> None:
    done = script(f"""
with Engine(threads=1) as engine:
    bad = [99999] if engine.is_leader else [1]
    try:
        {call}
    except UsageError as error:
        say("refused", len(str(error)), error.exit_code)
    say(engine.complete(ONCE, max_tokens=2).finish_reason)
""")
    assert (done.code, done.stderr) == (0, ""), done.output
    refused = [line.partition(" ")[2] for line in lines(done) if "refused" in line]
    assert len(refused) == RANKS
    assert len(set(refused)) == 1
    assert len([line for line in lines(done) if line.endswith("length")]) == RANKS


def test_a_bad_option_on_one_rank_is_an_error_on_all(script: Script) -> None:
    done = script("""
rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")))
try:
    Engine(threads=0 if rank == 1 else 1)
except DistMoeError as error:
    tell(error)
""")
    assert done.code == 0, done.output
    assert len(lines(done)) == RANKS
    assert len(set(lines(done))) == 1
    assert "threads: expected a whole number from 1 to 1024, found 0" in done.stdout


ENDINGS = {
    "one rank raises": ("if not engine.is_leader: raise ValueError('oops')", 1, "raised ValueError: oops"),
    "rank 0 raises": ("if engine.is_leader: raise ValueError('oops')", 1, "raised ValueError: oops"),
    "rank 0 raises in a loop": ("for piece in engine.generate(ONCE): raise ValueError('oops')", 1, "ValueError: oops"),
    "all raise": ("raise ValueError('oops')", 1, "raised ValueError: oops"),
    "rank 0 is interrupted": ("if engine.is_leader: raise KeyboardInterrupt", 130, "dist-moe: interrupted"),
    "other calls": (
        "engine.tokenize('x') if engine.is_leader else engine.complete(ONCE)",
        2,
        "rank 0 calls tokenize()",
    ),
    "a missing call": ("if not engine.is_leader: engine.complete(ONCE)", 2, "rank 0 has closed the engine without"),
}


@pytest.mark.parametrize(("body", "code", "message"), ENDINGS.values(), ids=ENDINGS)
def test_a_rank_that_leaves_ends_the_job(script: Script, body: str, code: int, message: str) -> None:
    done = script(f"with Engine(threads=1) as engine:\n    {body}\n    engine.complete(ONCE, max_tokens=3)\n")
    assert done.code == code, done.output
    own = [line for line in done.stderr.splitlines() if line.startswith("dist-moe: ")]
    assert len(own) == 1, done.output
    assert message in own[0]
    assert done.seconds < 30


def test_a_rank_that_closes_early_without_with_keeps_nobody_waiting(script: Script) -> None:
    done = script("""
engine = Engine(threads=1)
engine.load()
if engine.is_leader: engine.close()
else: engine.complete(ONCE)
""")
    assert done.code != 0, done.output
    assert "rank 0 has closed the engine without this complete()" in done.stderr
    assert done.seconds < 30


def test_communicators(script: Script) -> None:
    done = script("""
from mpi4py import MPI
rank = MPI.COMM_WORLD.rank
with Engine(comm=MPI.COMM_SELF, threads=1) as engine:
    own = engine.complete(ONCE, max_tokens=3 + rank)
    say("self", len(own.ids))
half = MPI.COMM_WORLD.Split(rank == 2, rank)
with Engine(comm=half, threads=1) as engine:
    say("half", half.size, engine.complete(ONCE, max_tokens=6).ids[:3] == own.ids[:3])
try:
    Engine(comm=MPI.COMM_NULL)
except UsageError as error:
    tell("null", str(error)[:24])
""")
    assert done.code == 0, done.output
    assert lines(done) == [
        "False half 2 True",
        "True half 1 True",
        "True half 2 True",
        "True self 3",
        "True self 4",
        "True self 5",
        *["null comm: expected an mpi4py"] * RANKS,
    ]


def test_ctrl_c_ends_a_script(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        HEAD
        + """
with Engine(threads=1) as engine:
    for piece in engine.generate(ONCE, max_tokens=100000, ignore_eos=True): print(piece.text, end="", flush=True)
"""
    )
    with Job(RANKS, sys.executable, str(path), env=environment) as job:
        job.wait_for_text()
        job.hit(job.process.pid, signal.SIGINT)
        ended = job.end()
    assert not ended.left, ended
    assert ended.code in (1, 130), ended
    assert "Traceback" not in ended.stderr, ended
