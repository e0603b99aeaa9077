"""Runs the same weights through dist-moe and through llama.cpp, alternately, and prints the ratios of their speeds.

    pip install '.[mpich,peers]'
    dist-moe bench --synthetic configs/qwen3-30b-a3b.toml --layers 12 --synthetic-dir STORE --prefill 0 --decode 1
    python benchmarks/peers.py STORE                    # every case; needs memory for the weights twice
    python benchmarks/peers.py STORE --only decode --rounds 5 -o json
    python benchmarks/peers.py --check                  # one random Q4_0 file in both engines: weights and logits
    python benchmarks/peers.py --check qwen3-30b-a3b    # ... of two layers of the 30B's shape, with its vocabulary

STORE has q4 or q8 weights in groups of 32. It is written once as a GGUF file beside it (--gguf), bit for bit. llama.cpp
is given its best: each case is first tried with weights repacked for this CPU and as they lie in the file, with and
without flash attention, and the fastest of these enters the rounds. A round runs ours (`dist-moe bench`, a process of
its own), then theirs (a process that sleeps meanwhile). Medians of the rounds are compared; min and max show the
spread. Measure on an idle machine. `--peer-python` names the Python that has llama-cpp-python, if it is another one;
given several times, the fastest build counts.

On CPUs with AMX, GCC before 12.5, 13.4 and 14 miscompiles llama.cpp's tile configuration (GCC bug 114098) and repacked
weights crash; build llama-cpp-python with clang, or without AMX: CMAKE_ARGS="-DCMAKE_C_FLAGS=-mno-amx-int8
-DCMAKE_CXX_FLAGS=-mno-amx-int8" pip install --no-binary llama-cpp-python llama-cpp-python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from llama_process import Llama, PeerError, Setup, Variant

SHORT = {"prefill": 2048, "decode": 8}  # tokens of a probe at most


@dataclass(frozen=True)
class Case:
    """What is timed: `tokens` of each of `batch` sequences that hold `depth` tokens already."""

    name: str
    test: str  # "prefill" or "decode"
    tokens: int
    batch: int = 1
    depth: int = 0
    kv: str = "f16"

    def rate(self, seconds: float) -> float:
        """Tokens per second of all sequences together."""
        return self.tokens * self.batch / seconds


CASES = (
    Case("decode", "decode", 48),
    Case("decode-4096-f16", "decode", 32, depth=4096),
    Case("decode-4096-q8", "decode", 32, depth=4096, kv="q8"),
    Case("decode-16-sequences", "decode", 16, batch=16),
    Case("prefill-256", "prefill", 256),
    Case("prefill-2048", "prefill", 2048),
)


@dataclass
class Result:
    """The rates of a case in tokens per second, one per round, and what llama.cpp was told."""

    case: Case
    variant: Variant
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    share: float = 0.0  # of the machine's bound, ours in the last round

    @property
    def ratio(self) -> float:
        """Our median over theirs."""
        return median(self.ours) / median(self.theirs)


def our_rate(store: Path, case: Case, threads: int, read_gib: float) -> tuple[float, float]:
    """Tokens per second of one repetition of `dist-moe bench`, and its share of what the machine allows."""
    words = ["-m", str(store), "--threads", str(threads), "--kv", case.kv, "--repeat", "1", "-o", "json"]
    words += ["--read-gib", str(read_gib)]
    if case.test == "prefill":
        words += ["--prefill", str(case.tokens), "--decode", "0"]
    else:
        words += ["--prefill", "0", "--decode", str(case.tokens), "--depth", str(case.depth)]
        words += ["--batch", str(case.batch)]
    done = subprocess.run([sys.executable, "-m", "dist_moe", "bench", *words], capture_output=True, text=True)
    try:
        (row,) = json.loads(done.stdout)
    except ValueError:
        raise SystemExit(f"dist-moe bench {' '.join(words)} failed:\n{done.stderr}") from None
    return row["tokens_per_s"], row["share"]


def their_rate(llama: Llama, case: Case, flash: bool) -> float:
    """Tokens per second of one repetition."""
    wanted = {"test": case.test, "tokens": case.tokens, "batch": case.batch, "depth": case.depth, "kv": case.kv}
    (seconds,) = llama.ask({**wanted, "flash": flash, "repeat": 1})["seconds"]
    return case.rate(seconds)


def probe(setups: list[Setup], cases: list[Case], start: Callable[[Setup], Llama]) -> dict[str, Variant]:
    """The settings with which llama.cpp is fastest, by the name of the case; builds that crash are left out."""
    rates: dict[str, dict[Variant, float]] = {case.name: {} for case in cases}
    for setup in setups:
        llama = start(setup)
        try:
            for case in cases:
                short = replace(case, tokens=min(case.tokens, SHORT[case.test]))
                for flash in (True,) if case.kv == "q8" else (True, False):  # a quantized V needs flash attention
                    variant = Variant(setup, flash)
                    rates[case.name][variant] = rate = their_rate(llama, short, flash)
                    show(f"{case.name}: llama.cpp with {variant}: {rate:.1f} tokens/s")
        except PeerError as error:
            show(f"llama.cpp of {setup}: {error}")
        llama.close()
    for case in cases:
        if not rates[case.name]:
            raise SystemExit(f"llama.cpp cannot run {case.name}")
    return {name: max(found, key=lambda variant: found[variant]) for name, found in rates.items()}


def compare(
    store: Path, llamas: dict[Setup, Llama], results: list[Result], rounds: int, threads: int, read_gib: float
) -> None:
    """Run the rounds and fill in the results."""
    for number in range(rounds):
        for result in results:
            rate, result.share = our_rate(store, result.case, threads, read_gib)
            result.ours.append(rate)
            result.theirs.append(their_rate(llamas[result.variant.setup], result.case, result.variant.flash))
            show(f"round {number + 1}: {result.case.name}: {rate:.1f} against {result.theirs[-1]:.1f} tokens/s")


def read_settings(path: Path | None) -> dict[str, Variant]:
    """The settings that an earlier run has chosen and kept."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text())
    return {name: Variant(Setup(**value["setup"]), value["flash"]) for name, value in found.items()}


def table(results: list[Result], facts: dict[str, str]) -> str:
    """The results as Markdown."""
    lines = [
        f"llama.cpp (ggml {facts['ggml']}, {facts['threads']} threads): {facts['system'].strip(' |')}",
        "",
        "| case | dist-moe tokens/s | llama.cpp tokens/s | ratio | share of the machine's bound | llama.cpp with |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for result in results:
        ours, theirs = (
            f"{median(rates):.1f} ({min(rates):.1f} - {max(rates):.1f})" for rates in (result.ours, result.theirs)
        )
        lines.append(
            f"| {result.case.name} | {ours} | {theirs} | {result.ratio:.2f} | {result.share:.0%} | {result.variant} |"
        )
    return "\n".join(lines)


def as_json(results: list[Result], facts: dict[str, str]) -> str:
    """The results as one object: facts, and a row per case."""
    rows = [
        {**asdict(result.case), "ratio": result.ratio, "ours": result.ours, "theirs": result.theirs}
        | {"share": result.share, **asdict(result.variant)}
        for result in results
    ]
    return json.dumps({"llama": facts, "rows": rows}, indent=1)


def chosen_cases(only: str | None) -> Iterator[Case]:
    """The cases whose names are listed; all of them without a list."""
    names = only.split(",") if only else [case.name for case in CASES]
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            raise SystemExit(f"--only {name}: give some of {', '.join(known)}")
        yield known[name]


def gguf_of(store: Path, wanted: Path | None) -> Path:
    """The store as a GGUF file, written if there is none that is newer."""
    path = wanted or store.with_name(store.name + ".gguf")
    if not path.exists() or path.stat().st_mtime < (store / "manifest.json").stat().st_mtime:
        from store_to_gguf import write_gguf

        from dist_moe.store.reader import Store

        show(f"writing {path}")
        partial = path.with_name(path.name + ".partial")
        write_gguf(Store.open(store), partial)
        partial.replace(path)
    return path


def show(line: str) -> None:
    """Tell what is being done."""
    print(line, file=sys.stderr, flush=True)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", help="a store of q4 or q8 weights in groups of 32")
    parser.add_argument("--gguf", type=Path, help="the same weights as GGUF  [default: STORE.gguf, written if need be]")
    parser.add_argument("--only", metavar="CASE,CASE", help=", ".join(case.name for case in CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--read-gib", type=float, default=4.0, help="what dist-moe bench reads to know the machine")
    parser.add_argument("--settings", type=Path, help="keeps what was chosen for llama.cpp; another run trusts it")
    parser.add_argument("--peer-python", action="append", help="one that has llama-cpp-python  [default: this]")
    parser.add_argument(
        "--check",
        nargs="?",
        const="small",
        metavar="SHAPE",
        help="compare logits of a random model of this shape instead",
    )
    parser.add_argument("-o", "--format", choices=("md", "json"), default="md")
    arguments = parser.parse_args(words)
    if arguments.store is None and arguments.check is None:
        parser.error("give a store, or --check")
    return arguments


def main() -> None:
    """Compare and print."""
    arguments = parse()
    pythons = arguments.peer_python or [sys.executable]
    if arguments.check is not None:
        from peer_check import SHAPES, check

        if arguments.check not in SHAPES:
            raise SystemExit(f"--check {arguments.check}: give one of {', '.join(SHAPES)}")
        print(check(pythons[0], arguments.threads, SHAPES[arguments.check]))
        return
    cases, path = list(chosen_cases(arguments.only)), gguf_of(arguments.store, arguments.gguf)

    def start(setup: Setup) -> Llama:
        return Llama(setup, path, arguments.threads)

    settings = read_settings(arguments.settings)
    unknown = [case for case in cases if case.name not in settings]
    if unknown:
        settings |= probe([Setup(python, repack) for python in pythons for repack in (True, False)], unknown, start)
    if arguments.settings is not None:
        arguments.settings.write_text(json.dumps({name: asdict(variant) for name, variant in settings.items()}))
    results = [Result(case, settings[case.name]) for case in cases]
    llamas = {setup: start(setup) for setup in {result.variant.setup for result in results}}
    try:
        compare(arguments.store, llamas, results, arguments.rounds, arguments.threads, arguments.read_gib)
        facts: dict[str, Any] = {**next(iter(llamas.values())).facts, "threads": str(arguments.threads)}
    finally:
        for llama in llamas.values():
            llama.close()
    print(as_json(results, facts) if arguments.format == "json" else table(results, facts))


if __name__ == "__main__":
    main()
