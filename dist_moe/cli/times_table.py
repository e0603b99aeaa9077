"""`--debug timing`: a line per step and a table at the end, of milliseconds by part on rank 0."""

from __future__ import annotations

from dataclasses import dataclass, field

from dist_moe.model.stopwatch import Part, StepTimes


@dataclass
class _Column:
    """Steps of one kind, added up."""

    steps: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0] * len(Part))

    def add(self, times: StepTimes) -> None:
        self.steps += 1
        self.tokens += times.tokens
        self.seconds = [before + own for before, own in zip(self.seconds, times.seconds, strict=True)]


class TimesTable:
    """Adds up steps; those with prompt tokens are prefill, the others decode."""

    def __init__(self) -> None:
        """No step yet."""
        self._columns = {"prefill": _Column(), "decode": _Column()}

    @property
    def steps(self) -> int:
        """Steps that were added."""
        return sum(column.steps for column in self._columns.values())

    def add(self, times: StepTimes) -> None:
        """Count a step."""
        self._columns["prefill" if times.prompt_tokens else "decode"].add(times)

    def lines(self) -> list[str]:
        """The table, empty without a step."""
        if self.steps == 0:
            return []
        named = [(name, column) for name, column in self._columns.items() if column.steps]
        head = [f"{name} ({column.tokens} tokens in {column.steps} steps)" for name, column in named]
        lines = ["timing: " + " | ".join(["part      ", *(f"{title:<40}" for title in head)]).rstrip()]
        units = f"{'ms':>10} {'ms/token':>12} {'share':>8}" + " " * 8
        lines.append("timing: " + " | ".join(["          ", *(units for _ in named)]).rstrip())
        for part in Part:
            cells = [_cell(column.seconds[part], column) for _, column in named]
            lines.append("timing: " + " | ".join([f"{part.label:<10}", *cells]).rstrip())
        totals = [_cell(sum(column.seconds), column) for _, column in named]
        lines.append("timing: " + " | ".join([f"{'all':<10}", *totals]).rstrip())
        return lines


def step_line(number: int, times: StepTimes) -> str:
    """One step's parts; those below a microsecond are left out."""
    kinds = {"prompt": times.prompt_tokens, "decoded": times.decoded_tokens}
    tokens = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    parts = [f"{part.label} {times.seconds[part] * 1e3:.3f}" for part in Part if times.seconds[part] >= 1e-6]
    plural = "token" if times.tokens == 1 else "tokens"
    return f"timing: step {number}, {tokens} {plural}: {sum(times.seconds) * 1e3:.3f} ms: {', '.join(parts)}"


def _cell(seconds: float, column: _Column) -> str:
    total = sum(column.seconds) or 1.0
    per_token = seconds * 1e3 / max(1, column.tokens)
    return f"{seconds * 1e3:10.3f} {per_token:12.4f} {seconds / total:8.1%}" + " " * 8
