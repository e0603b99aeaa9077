"""`dist-moe`, but one rank fails: python faulty.py ACT PHASE RANK -- arguments of dist-moe.

ACT: none, slow (every decode takes long), raise, exit, kill, stop (SIGSTOP), hang or starve (a kernel gets no memory).
PHASE: start (before MPI), join (after it), load, prefill, decode or exchange.
Everything else is the product's own code.
"""

# ruff: noqa: E402  (the lifeline comes before what takes long to import)
from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.lifeline import hold_lifeline

hold_lifeline(detect_launcher(os.environ), os.environ)  # as the product's first lines do

import numpy as np

from dist_moe.cli.main import main
from dist_moe.engine.steps.worker import Worker
from dist_moe.kernels import Kernels
from dist_moe.model.step import Step
from dist_moe.model.transformer import Transformer
from dist_moe.parallel import node_exchange, world

LAYER = 2
DECODE_STEP = 4
SLOW = "a slow step\n"
HANGS = "a rank hangs\n"


def act(what: str) -> None:
    """Fail as asked."""
    if what == "raise":
        raise RuntimeError("broken on purpose")
    if what == "exit":
        sys.exit(5)
    if what == "slow":
        os.write(2, SLOW.encode())
        time.sleep(0.05)
        return
    if what == "hang":
        os.write(2, HANGS.encode())
        threading.Event().wait()
    if what == "starve":
        starve()
        raise AssertionError("the kernel found memory")
    os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)


def starve() -> None:
    """Call a kernel that wants 96 MB (more than malloc keeps in reserve) where there are 4."""
    kernels, logits_TE = Kernels(1), np.zeros((1, 1 << 24), np.float32)
    ids_TK, weights_TK, fault_T = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), np.zeros(1, np.int32)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20),) * 2)
    kernels.route(ids_TK, weights_TK, fault_T, logits_TE, False, 0)


def before(owner: Any, name: str, fail: Callable[..., None]) -> None:
    """Call `fail` with the method's arguments before each call of it."""
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        fail(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, failing)


def plant(what: str, phase: str) -> None:
    """Let this process fail in a phase."""
    steps = [0]

    def count(worker: Worker, step: Step, *rest: Any) -> None:
        steps[0] += 1

    def in_step(model: Transformer, layer: int, *rest: Any) -> None:
        wanted = 1 if phase == "prefill" else DECODE_STEP
        if layer == LAYER and (steps[0] == wanted or (what == "slow" and steps[0] > wanted)):
            act(what)

    def in_exchange(*rest: Any) -> None:
        if steps[0] == DECODE_STEP:
            act(what)

    before(Worker, "run", count)
    if phase == "start":
        before(world, "start_mpi", lambda *rest: act(what))
    elif phase == "join":
        before(world.World, "_join", lambda *rest: act(what))
    elif phase == "load":
        before(Transformer, "__init__", lambda *rest, **more: act(what))
    elif phase == "exchange":
        before(node_exchange.NodeExchange, "sum_exact", in_exchange)
    else:
        before(Transformer, "_layer", in_step)


if __name__ == "__main__":
    place = sys.argv.index("--")
    wanted_act, wanted_phase, wanted_rank = sys.argv[1:place]
    sys.argv = ["dist-moe", *sys.argv[place + 1 :]]
    if wanted_act != "none" and detect_launcher(os.environ).rank == int(wanted_rank):
        plant(wanted_act, wanted_phase)
    sys.exit(main())
