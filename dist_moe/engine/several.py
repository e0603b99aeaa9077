"""Several continuations of one prompt, best first: samples or beams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dist_moe.engine.requests.beams import BeamOptions
from dist_moe.engine.requests.request import Completion, Request
from dist_moe.engine.requests.scores import ranking, score_of
from dist_moe.engine.runtime import Runtime
from dist_moe.engine.start.settings import MOST_BEAMS, MOST_LOGPROBS, MOST_SAMPLES, require_number, require_whole
from dist_moe.errors import UsageError


@dataclass(frozen=True)
class Continuation:
    """One of several; `sample` is None for a beam, `score` what it is ranked by."""

    completion: Completion
    sample: int | None
    score: float


@dataclass(frozen=True)
class Search:
    """How many continuations: `beams` of a beam search if that is not None, else `samples`; see `scores.score`."""

    samples: int = 1
    beams: int | None = None
    length_penalty: float = 0.0

    def require_valid(self, logprobs: int) -> None:
        """Refuse values that nothing can be done with, and more logprobs than candidates.

        Raises:
            UsageError: One of them.
        """
        require_whole("samples", self.samples, 1, MOST_SAMPLES)
        if self.beams is not None:
            require_whole("beams", self.beams, 1, MOST_BEAMS)
            if self.samples != 1:
                raise UsageError("samples and beams exclude each other: a beam search draws nothing")
        require_number("length_penalty", self.length_penalty, 0, 10)
        require_whole("logprobs", logprobs, 0, MOST_LOGPROBS)


def continue_several(
    runtime: Runtime, request: Request, search: Search, valid_vocabulary: int, interrupted: Callable[[], bool]
) -> list[Continuation]:
    """Make them all together in shared steps; on rank 0 alone.

    Args:
        runtime: The model.
        request: The prompt. Its sample is the first one's; its logprobs are noted whatever it says.
        search: What to make.
        valid_vocabulary: Ids from here on are masked.
        interrupted: Asked after each step whether to end with what there is.

    Returns:
        Best first; those that overflowed stand last.

    Raises:
        UsageError, AgreedError: As `Runtime.generate`.
    """
    request = replace(request, logprobs=request.logprobs or 0)
    samples: list[int | None]
    if search.beams is not None:
        options = BeamOptions(search.beams, search.length_penalty)
        completions = runtime.beam_search(request, options, valid_vocabulary, interrupted)
        samples = [None] * len(completions)
    else:
        samples = [request.sample + i for i in range(search.samples)]
        requests = [replace(request, sample=request.sample + i) for i in range(search.samples)]
        completions = runtime.generate(requests, None, valid_vocabulary, interrupted)
    return [
        Continuation(completions[place], samples[place], score_of(completions[place], search.length_penalty))
        for place in ranking(completions, search.length_penalty)
    ]
