"""How many positions a run has, and what a prompt that is longer is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dist_moe.cli.prompt import require_room
from dist_moe.cli.run import context_size
from dist_moe.errors import UsageError
from helpers.command_options import RUN


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    text = "the prompt has 9 tokens, but the context has 8 positions"
    with pytest.raises(UsageError, match=rf"{text} \(the model's maximum\): shorten the prompt$"):
        require_room(9, 8, 8)
    with pytest.raises(UsageError, match=rf"{text} \(--ctx\): .* or raise --ctx, up to the model's maximum of 10$"):
        require_room(9, 8, 10)
    with pytest.raises(UsageError, match=r"shorten the prompt$"):
        require_room(12, 8, 10)


def test_the_context_is_as_long_as_needed_or_possible() -> None:
    assert context_size(RUN, 10, 100) == 18
    assert context_size(RUN, 95, 100) == 100
    assert context_size(replace(RUN, ctx=50), 10, 100) == 50
    with pytest.raises(UsageError, match="--ctx 101 is more than the model's maximum of 100"):
        context_size(replace(RUN, ctx=101), 10, 100)
    with pytest.raises(UsageError, match=r"10 tokens, but the context has 9 positions \(--ctx\)"):
        context_size(replace(RUN, ctx=9), 10, 100)
