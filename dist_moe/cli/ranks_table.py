"""`--stats` as tables: what each rank computed, waited for and sent (words: `dist_moe.engine.watch.accounts`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_moe.engine.watch.accounts import PHASES, WORK, Accounts
from dist_moe.engine.watch.verdict import verdict
from dist_moe.parallel.ledger import Kind

_MOST_LISTED_RANKS = 64


def ranks_table(accounts: Accounts, hosts: tuple[str, ...]) -> list[str]:
    """The tables of prefill and decode, and a sentence of what limits; empty without a step.

    Args:
        accounts: Of all ranks.
        hosts: Host of each rank.
    """
    lines = []
    for p, phase in enumerate(PHASES):
        if accounts.steps_P[p]:
            lines += [*_rank_lines(accounts, p, phase, hosts), *_exchange_lines(accounts, p)]
            lines += _straggling_lines(accounts, phase)
    if accounts.error_ns:
        lines.append(
            f"the hosts' clocks are compared to +-{accounts.error_ns / 1000:.0f} us: as much of each wait may be wire"
        )
    if accounts.dropped:
        lines.append(f"{accounts.dropped} exchanges between steps found no room in the ledger and are missing above")
    sentence = verdict(accounts, hosts)
    return [f"stats: {line}".rstrip() for line in (*lines, *([sentence] if sentence else []))]


def ranks_as_json(accounts: Accounts, hosts: tuple[str, ...]) -> dict[str, Any]:
    """The same as data: per phase seconds of each rank, and of each kind of exchange; bytes are of all ranks."""
    return {phase: _phase_as_json(accounts, p, hosts) for p, phase in enumerate(PHASES) if accounts.steps_P[p]}


def _phase_as_json(accounts: Accounts, p: int, hosts: tuple[str, ...]) -> dict[str, Any]:
    straggling = accounts.straggling
    ranks = [
        {
            "host": hosts[rank],
            **{f"{name}_s": float(s) for name, s in zip(WORK, accounts.compute_PRW[p, rank], strict=True)},
            "wait_s": float(accounts.wait_PRK[p, rank].sum()),
            "wire_s": float(accounts.wire_PRK[p, rank].sum()),
            "between_s": float(accounts.between_PR[p, rank]),
            "experts_work": int(straggling.work_PRL[p, rank].sum()),
        }
        for rank in range(accounts.ranks)
    ]
    exchanges = {
        kind.label: {
            "calls": int(accounts.calls_PK[p, kind]),
            "wire_bytes": int(accounts.sent_PRK2[p, :, kind, 0].sum()),
            "shared_bytes": int(accounts.sent_PRK2[p, :, kind, 1].sum()),
            "wait_s": float(accounts.wait_PRK[p, :, kind].mean()),
            "wire_s": float(accounts.wire_PRK[p, :, kind].mean()),
        }
        for kind in Kind
        if accounts.calls_PK[p, kind]
    }
    return {
        "tokens": int(accounts.tokens_P[p]),
        "steps": int(accounts.steps_P[p]),
        "ranks": ranks,
        "exchanges": exchanges,
        "straggling": {
            "ranks": straggling.mean(straggling.of_ranks_PL, PHASES[p]),
            "nodes": straggling.mean(straggling.of_nodes_PL, PHASES[p]),
            "times": straggling.mean(straggling.of_times_PL, PHASES[p]),
        },
    }


def _rank_lines(accounts: Accounts, p: int, phase: str, hosts: tuple[str, ...]) -> Iterator[str]:
    tokens, steps = int(accounts.tokens_P[p]), int(accounts.steps_P[p])
    yield f"{phase}: {tokens} tokens in {steps} steps; ms per token"
    wide = max(4, *(len(host) for host in hosts))
    head = ("compute", *WORK, "wait", "wire", "between", "experts' work")
    yield f"{'rank':>6} {'host':<{wide}} " + " ".join(f"{title:>9}" for title in head)
    scale = 1e3 / max(1, tokens)
    work_R = accounts.straggling.work_PRL[p].sum(axis=1)
    for rank in range(min(accounts.ranks, _MOST_LISTED_RANKS)):
        figures = (
            accounts.compute_PRW[p, rank].sum(),
            *accounts.compute_PRW[p, rank],
            accounts.wait_PRK[p, rank].sum(),
            accounts.wire_PRK[p, rank].sum(),
            accounts.between_PR[p, rank],
        )
        cells = " ".join(f"{seconds * scale:9.3f}" for seconds in figures)
        share = work_R[rank] / max(1, work_R.sum())
        yield f"{rank:>6} {hosts[rank]:<{wide}} {cells} {share:13.1%}"
    if accounts.ranks > _MOST_LISTED_RANKS:
        yield f"{'':>6} and {accounts.ranks - _MOST_LISTED_RANKS} more ranks"


def _exchange_lines(accounts: Accounts, p: int) -> Iterator[str]:
    if accounts.ranks == 1:
        return
    tokens, steps = max(1, int(accounts.tokens_P[p])), max(1, int(accounts.steps_P[p]))
    head = ("per step", "wire B/token", "shared B/token", "wait ms", "wire ms")
    yield f"{'exchange':>10} " + " ".join(f"{title:>14}" for title in head)
    for kind in Kind:
        if accounts.calls_PK[p, kind] == 0:
            continue
        by_mpi, shared = accounts.sent_PRK2[p, :, kind].sum(axis=0) / tokens
        wait_s, wire_s = accounts.wait_PRK[p, :, kind].mean(), accounts.wire_PRK[p, :, kind].mean()
        yield (
            f"{kind.label:>10} {accounts.calls_PK[p, kind] / steps:14.1f} {by_mpi:14.0f} {shared:14.0f} "
            f"{wait_s * 1e3 / tokens:14.3f} {wire_s * 1e3 / tokens:14.3f}"
        )


def _straggling_lines(accounts: Accounts, phase: str) -> Iterator[str]:
    straggling, p = accounts.straggling, PHASES.index(phase)
    if accounts.ranks == 1 or not straggling.counts_PL[p].any():
        return
    of_ranks_PL = straggling.of_ranks_PL
    worst = int(of_ranks_PL[p].argmax())
    nodes = int(accounts.node_R.max()) + 1
    of_nodes = f", over {nodes} hosts {straggling.mean(straggling.of_nodes_PL, phase):.2f}" if nodes > 1 else ""
    yield (
        f"straggling (max/mean, mean over steps): experts' work over {accounts.ranks} ranks "
        f"{straggling.mean(of_ranks_PL, phase):.2f}{of_nodes}; most in layer {worst}, {of_ranks_PL[p, worst]:.2f}; "
        f"of their time {straggling.mean(straggling.of_times_PL, phase):.2f}"
    )
