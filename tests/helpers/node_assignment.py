"""What csrc/pick.c decides, in plain Python: which node computes what of a step's experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from dist_moe.parallel.expert_plan import ChunkRuns

FEW_TOKENS, SPLIT_BLOCK, MOST_LOOKS = 4, 16, 16384

Part = tuple[int, int, int, int, int, int]  # expert, node, first chunk, chunks, first entry, entries


@dataclass
class Work:
    """The work on one run of chunks: `units` of `cost` each, and `fixed` once for every node that has any."""

    run: tuple[int, ...]
    holders: list[int]
    units: int
    cost: int
    fixed: int
    on: dict[int, int] = field(default_factory=dict)

    def gain(self, node: int) -> int:
        return self.cost + (0 if self.on[node] else self.fixed)

    def loss(self, node: int) -> int:
        return self.cost + (self.fixed if self.on[node] == 1 else 0)


def cut(run: tuple[int, ...], holders: list[int], tokens: int, read: int, keep_tokens: bool) -> Work:
    """A run's work in units: chunks, or all of it, or blocks of tokens."""
    chunks, few = run[2], tokens <= FEW_TOKENS * read
    on = dict.fromkeys(holders, 0)
    if not keep_tokens and (chunks >= len(holders) or few):
        return Work(run, holders, chunks, tokens + read, 0, on)
    if few:
        return Work(run, holders, 1, chunks * (tokens + read), 0, on)
    return Work(run, holders, -(-tokens // SPLIT_BLOCK), chunks * SPLIT_BLOCK, chunks * read, on)


def assign(runs: ChunkRuns, offset_E1: Sequence[int], speeds: Sequence[int], read: int, keep: bool) -> list[Part]:
    """The parts of a step, in C's order."""
    load = [0] * len(speeds)
    picked: list[Work] = []
    for run in map(tuple, runs.runs_R5.tolist()):
        tokens = offset_E1[run[0] + 1] - offset_E1[run[0]]
        if tokens and run[4]:
            picked.append(cut(run, runs.node_H[run[3] : run[3] + run[4]].tolist(), tokens, read, keep))
    for work in picked:
        if len(work.holders) == 1:
            work.on[work.holders[0]] = work.units
            load[work.holders[0]] += work.units * work.cost + work.fixed
    free = sorted((work for work in picked if len(work.holders) > 1), key=lambda w: -(w.units * w.cost + w.fixed))
    for work in free:
        for _ in range(work.units):
            node = min(work.holders, key=lambda n: (load[n] + work.gain(n)) / speeds[n])  # the lowest of several
            load[node] += work.gain(node)
            work.on[node] += 1
    looks = [0]
    while free and looks[0] < MOST_LOOKS and _relieve(free, load, speeds, looks):
        pass
    return [part for work in picked for part in _parts(work, offset_E1)]


def _relieve(free: list[Work], load: list[int], speeds: Sequence[int], looks: list[int]) -> bool:
    nodes = range(len(load))
    top = max(nodes, key=lambda n: (load[n] / speeds[n], -n))
    limit = load[top] / speeds[top]
    least = min(work.cost for work in free)
    if (load[top] - least) * sum(speeds) < sum(load) * speeds[top]:
        return False
    came: dict[int, tuple[int, Work | None, int]] = {top: (top, None, 0)}
    queue = [top]
    for at in count():
        if at == len(queue):
            return False
        a = queue[at]
        for work in reversed(free):
            if looks[0] >= MOST_LOOKS:
                break
            looks[0] += len(work.holders)
            if not work.on.get(a):
                continue
            left = load[a] + came[a][2] - work.loss(a)
            if a != top and left > load[a] and left / speeds[a] >= limit:
                continue
            for node in work.holders:
                if node in came:
                    continue
                came[node] = (a, work, work.gain(node))
                queue.append(node)
                if (load[node] + came[node][2]) / speeds[node] < limit:
                    _move(came, node, load)
                    return True
    return False


def _move(came: dict[int, tuple[int, Work | None, int]], node: int, load: list[int]) -> None:
    while came[node][0] != node:
        before, work, _ = came[node]
        assert work is not None
        load[before] -= work.loss(before)
        work.on[before] -= 1
        load[node] += work.gain(node)
        work.on[node] += 1
        node = before


def _parts(work: Work, offset_E1: Sequence[int]) -> list[Part]:
    expert, first_chunk, chunks = work.run[:3]
    first, tokens = offset_E1[expert], offset_E1[expert + 1] - offset_E1[expert]
    parts, done = [], 0
    for node in work.holders:
        units = work.on[node]
        if not units:
            continue
        if work.fixed:
            begin, end = done * SPLIT_BLOCK, min((done + units) * SPLIT_BLOCK, tokens)
            parts.append((expert, node, first_chunk, chunks, first + begin, end - begin))
        else:
            each = chunks // work.units
            parts.append((expert, node, first_chunk + done * each, units * each, first, tokens))
        done += units
    return parts
