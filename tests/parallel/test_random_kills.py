"""A few kills at random moments; `helpers/random_kills.py 200` is the long form."""

from __future__ import annotations

import pytest

from helpers.random_kills import random_kills

pytestmark = pytest.mark.faults


def test_whoever_is_killed_whenever_the_job_ends_cleanly() -> None:
    for kill in random_kills(6, ranks=3, seed=7):
        assert kill.clean, kill
