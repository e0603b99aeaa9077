"""llama.cpp in a process of its own (llama_worker.py), asked by lines of JSON."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("llama_worker.py")


class PeerError(Exception):
    """llama.cpp cannot do something, or crashed."""


@dataclass(frozen=True)
class Setup:
    """A build of llama.cpp, and how it keeps the weights."""

    python: str  # of the environment that it is installed in
    repack: bool  # for this CPU, which is its default, or as they lie in the file


@dataclass(frozen=True)
class Variant:
    """How llama.cpp runs."""

    setup: Setup
    flash: bool  # flash attention

    def __str__(self) -> str:
        """In words."""
        weights, attention = "repacked" if self.setup.repack else "mapped", "flash" if self.flash else "plain"
        return f"{weights} weights, {attention} attention, {Path(self.setup.python).parents[1].name}"


class Llama:
    """A loaded model that answers requests; see llama_worker.py."""

    def __init__(self, setup: Setup, model: Path, threads: int) -> None:
        """Start the process and wait until the model is loaded; raises PeerError if that fails."""
        words = [setup.python, str(WORKER), str(model), "--threads", str(threads)]
        words += ["--repack", "yes" if setup.repack else "no"]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts: dict[str, str] = self._answer()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer; raises PeerError if the process dies of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError("llama.cpp's process has ended") from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise PeerError(
                f"llama.cpp's process ended with {code}"
                + (": it crashed (GCC before 14 breaks its AMX kernels: see peers.py)" if code < 0 else "")
            )
        found: dict[str, Any] = json.loads(line)
        return found
