"""Which experts a calibration's texts reached."""

from __future__ import annotations

from collections.abc import Sequence

from dist_moe.store.calibration import LEAST_TOKENS, Calibration

_MOST_NAMED = 16


def coverage_lines(calibration: Calibration) -> list[str]:
    """What to say of experts with few tokens, and of those with none; one line at least."""
    routed = [moments for moments in calibration.layers if len(moments.tokens_E) > 1]
    if not routed:
        return ["the model has no experts: every token counts for every matrix"]
    experts = sum(len(moments.tokens_E) for moments in routed)
    fewest = min(int(moments.tokens_E.min()) for moments in routed)
    sparse = sum(len(moments.sparse) for moments in routed)
    lines = [f"{experts} experts in {len(routed)} layers, {fewest} tokens or more each"]
    if sparse:
        lines = [
            f"{experts} experts in {len(routed)} layers; {sparse} have fewer than {LEAST_TOKENS} tokens and take the "
            "mean of their layer's experts; more text reaches more of them"
        ]
    for layer, moments in enumerate(calibration.layers):
        few = [expert for expert in moments.sparse if expert not in moments.unrouted]
        if moments.unrouted:
            lines.append(f"layer {layer}: never routed: {_named(moments.unrouted)}")
        if few:
            lines.append(f"layer {layer}: fewer than {LEAST_TOKENS} tokens: {_named(few)}")
    return lines


def _named(experts: Sequence[int]) -> str:
    words = ", ".join(map(str, experts[:_MOST_NAMED]))
    more = len(experts) - _MOST_NAMED
    return f"experts {words} and {more} more" if more > 0 else f"expert{'s' if len(experts) > 1 else ''} {words}"
