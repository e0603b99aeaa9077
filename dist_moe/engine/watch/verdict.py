"""What limits a run, in one sentence, from the ranks' accounts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.engine.watch.accounts import PHASES, WORK, Accounts
from dist_moe.parallel.ledger import Kind

# Whoever waits, another rank computes: waiting hardly exceeds computing, so from this share on it is what limits.
_MUCH_WAITING = 0.25
# From this max/mean of the experts' work on, it is the work that makes ranks wait, not their speed.
_UNEVEN_WORK = 1.1


def token_shares(accounts: Accounts, phase: str) -> dict[str, float]:
    """What a token's time goes to, as shares of 1: means over ranks, and rank 0's time between steps."""
    p = PHASES.index(phase)
    seconds = {
        "compute": float(accounts.compute_PRW[p].sum(axis=1).mean()),
        "wait": float(accounts.wait_PRK[p].sum(axis=1).mean()),
        "wire": float(accounts.wire_PRK[p].sum(axis=1).mean()),
        "between": float(accounts.between_PR[p, 0]),
    }
    total = sum(seconds.values()) or 1.0
    return {name: value / total for name, value in seconds.items()}


def verdict(accounts: Accounts, hosts: tuple[str, ...]) -> str:
    """The sentence: of decoding, or of the prompt where nothing was decoded; "" without a step.

    Args:
        accounts: Of all ranks.
        hosts: Host of each rank.
    """
    phases = [phase for phase in reversed(PHASES) if accounts.steps_P[PHASES.index(phase)]]
    if not phases:
        return ""
    phase = phases[0]
    shares = token_shares(accounts, phase)
    most = max(shares, key=lambda name: shares[name])
    if most == "compute" and shares["wait"] >= _MUCH_WAITING:
        most = "wait"
    tell = {"compute": _computing, "wait": _waiting, "wire": _moving, "between": _between}[most]
    return f"{phase} is limited by {tell(accounts, PHASES.index(phase), hosts, f'{shares[most]:.0%}')}"


def _computing(accounts: Accounts, p: int, hosts: tuple[str, ...], share: str) -> str:
    seconds_W = accounts.compute_PRW[p].mean(axis=0)
    text = f"computing, {share} of a token's time"
    if accounts.ranks == 1:
        return f"{text}: --debug timing shows which part"
    return f"{text}, most of it in {WORK[int(seconds_W.argmax())]}: more ranks, or more cores for each, would help"


def _waiting(accounts: Accounts, p: int, hosts: tuple[str, ...], share: str) -> str:
    seconds_R = accounts.compute_PRW[p].sum(axis=1)
    last = int(seconds_R.argmax())
    text = (
        f"waiting for the last rank, {share} of a token's time: rank {last} on {hosts[last]} computes "
        f"{_ratio(seconds_R):.2f} times the mean"
    )
    straggling = accounts.straggling
    uneven = straggling.mean(straggling.of_ranks_PL, PHASES[p])
    if uneven > _UNEVEN_WORK:
        return (
            f"{text}, and the experts' work of a step is uneven (max/mean {uneven:.2f}): hold the "
            "hot experts more than once"
        )
    return f"{text} with the same share of the experts: look at its cores, and at what else runs on them"


def _moving(accounts: Accounts, p: int, hosts: tuple[str, ...], share: str) -> str:
    kind = Kind(int(accounts.wire_PRK[p].mean(axis=0).argmax()))
    calls = accounts.calls_PK[p, kind] / max(1, accounts.steps_P[p])
    text = f"moving bytes, {share} of a token's time, most of it in {kind.label} ({calls:.0f} per step)"
    if len(set(hosts)) > 1:
        return f"{text}: a quicker network or fewer hosts would help"
    return f"{text}: fewer ranks with more threads each would help"


def _between(accounts: Accounts, p: int, hosts: tuple[str, ...], share: str) -> str:
    return f"what rank 0 does between steps, {share} of a token's time: drawing, printing, and whoever reads the output"


def _ratio(seconds_R: npt.NDArray[np.float64]) -> float:
    return float(seconds_R.max() / (seconds_R.mean() or 1.0))
