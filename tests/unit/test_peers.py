"""The comparison with llama.cpp as far as it needs no llama.cpp: cases, choice of settings, ratios."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers")


class FakeLlama:
    """Answers with the rate of its settings; one build crashes at its second request."""

    def __init__(self, peers: ModuleType, setup: object) -> None:
        self.peers, self.setup, self.asked = peers, setup, 0

    def ask(self, request: dict[str, object]) -> dict[str, list[float]]:
        self.asked += 1
        if self.setup.python == "/crashes/bin/python" and self.asked > 1:
            raise self.peers.PeerError("crashed")
        rate = 100.0 + 50 * self.setup.repack + (20 if request["flash"] else 0) - int(request["depth"])
        return {"seconds": [int(request["tokens"]) * int(request["batch"]) / rate]}

    def close(self) -> None: ...


def test_the_fastest_settings_enter_the_rounds(peers: ModuleType) -> None:
    setups = [peers.Setup(f"/{name}/bin/python", repack) for name in ("works", "crashes") for repack in (False, True)]
    cases = [case for case in peers.CASES if case.depth == 0]
    chosen = peers.probe(setups, cases, lambda setup: FakeLlama(peers, setup))
    assert chosen == {case.name: peers.Variant(peers.Setup("/works/bin/python", True), True) for case in cases}


def test_settings_are_kept(peers: ModuleType, tmp_path: Path) -> None:
    variant = peers.Variant(peers.Setup("/a/bin/python", False), True)
    (tmp_path / "s.json").write_text(json.dumps({"decode": asdict(variant)}))
    assert peers.read_settings(tmp_path / "s.json") == {"decode": variant}
    assert peers.read_settings(tmp_path / "none.json") == {}


def test_ratios_are_of_medians(peers: ModuleType) -> None:
    variant = peers.Variant(peers.Setup("/env/bin/python", True), False)
    result = peers.Result(peers.CASES[0], variant, [30.0, 90.0, 33.0], [10.0, 11.0, 50.0], 0.9)
    assert result.ratio == 3
    facts = {"ggml": "abc", "threads": "2", "system": "CPU : AVX2 = 1 | "}
    line = peers.table([result], facts).splitlines()[-1]
    assert line.startswith("| decode | 33.0 (30.0 - 90.0) | 11.0 (10.0 - 50.0) | 3.00 | 90% | repacked weights, plain")
    row = json.loads(peers.as_json([result], facts))["rows"][0]
    assert (row["name"], row["ratio"], row["flash"], row["setup"]["repack"]) == ("decode", 3, False, True)


def test_unknown_cases_are_named(peers: ModuleType) -> None:
    assert [case.name for case in peers.chosen_cases("prefill-256,decode")] == ["prefill-256", "decode"]
    with pytest.raises(SystemExit, match="--only none: give some of decode, decode-4096-f16"):
        list(peers.chosen_cases("none"))
