"""llama.cpp in a process of its own (llama_worker.py), asked by lines of JSON."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("llama_worker.py")


@dataclass(frozen=True)
class Variant:
    """How llama.cpp runs."""

    repack: bool  # weights repacked for this CPU (its default), or as they lie in the file
    flash: bool  # flash attention

    def __str__(self) -> str:
        """In words."""
        return f"{'repacked' if self.repack else 'mapped'} weights, {'flash' if self.flash else 'plain'} attention"


class Llama:
    """A loaded model that answers requests; see llama_worker.py."""

    def __init__(self, python: str, model: Path, threads: int, repack: bool, states: Path | None = None) -> None:
        """Start the process and wait until the model is loaded."""
        words = [python, str(WORKER), str(model), "--threads", str(threads), "--repack", "yes" if repack else "no"]
        if states is not None:
            states.mkdir(parents=True, exist_ok=True)
            words += ["--states", str(states)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts: dict[str, str] = self._answer()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp's process ended with {self._process.wait()}; is llama-cpp-python installed?")
        found: dict[str, Any] = json.loads(line)
        return found
