"""What a run says about itself at its end."""

from __future__ import annotations

import json
from typing import Any

from dist_moe.engine.requests.pieces import Result
from dist_moe.engine.watch.statistics import EngineStatistics


def summary_lines(statistics: EngineStatistics) -> list[str]:
    """A run's speed in two lines: load, prefill and decode; then where a token's time went."""
    figures = timings(statistics)
    reused = f" ({statistics.reused_tokens} reused)" if statistics.reused_tokens else ""
    tokens = max(1, statistics.prefill_tokens + statistics.decode_tokens)
    return [
        f"load {statistics.load_s:.2f} s | prefill {statistics.prefill_tokens} tokens{reused}, "
        f"{figures['prefill_tokens_per_s']:.1f} tokens/s | decode {statistics.decode_tokens} tokens, "
        f"{figures['decode_tokens_per_s']:.1f} tokens/s",
        f"per token: compute {figures['compute_ms_per_token']:.2f} ms, "
        f"waiting {figures['waiting_ms_per_token']:.2f} ms, exchange {figures['exchange_ms_per_token']:.2f} ms | "
        f"sent {_bytes(statistics.sent_bytes)} in all, {_bytes(statistics.sent_bytes / tokens)} per token",
    ]


def timings(statistics: EngineStatistics) -> dict[str, float]:
    """A run's figures by name; milliseconds are per token, prompt and generated tokens alike."""
    tokens = max(1, statistics.prefill_tokens + statistics.decode_tokens)
    return {
        "load_s": statistics.load_s,
        "prefill_s": statistics.prefill_s,
        "prefill_tokens_per_s": _rate(statistics.prefill_tokens, statistics.prefill_s),
        "decode_s": statistics.decode_s,
        "decode_tokens_per_s": _rate(statistics.decode_tokens, statistics.decode_s),
        "compute_ms_per_token": statistics.compute_s / tokens * 1e3,
        "waiting_ms_per_token": statistics.waiting_s / tokens * 1e3,
        "exchange_ms_per_token": statistics.exchange_s / tokens * 1e3,
        "sent_bytes": statistics.sent_bytes,
        "prefill_tokens": statistics.prefill_tokens,
        "reused_tokens": statistics.reused_tokens,
    }


def ending(result: Result) -> str:
    """Why a text ended, in one line."""
    stop = f" {json.dumps(result.stop, ensure_ascii=False)}" if result.stop is not None else ""
    return f"finish reason: {result.finish_reason}{stop}"


def as_json(result: Result, text: str | None, statistics: EngineStatistics) -> dict[str, Any]:
    """A finished run as one JSON object; `text` is null for a model without a tokenizer."""
    usage = result.usage
    return {
        "text": text,
        "ids": list(result.ids),
        "finish_reason": result.finish_reason,
        "stop": result.stop,
        "error": result.error,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "reused_tokens": usage.reused_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
        "timings": {name: _six_digits(value) for name, value in timings(statistics).items()},
    }


def _six_digits(value: float) -> float:
    """Counts as they are; measurements without the digits that no clock gives."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
