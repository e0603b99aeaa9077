"""A step survives its trip as words."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dist_moe.model.step import Fork, Slice, Step

ids = st.integers(0, 2**31 - 1)
slices = st.builds(Slice, ids, ids, st.lists(ids, min_size=1, max_size=9).map(tuple))
forks = st.builds(Fork, ids, ids, ids)


@given(
    parts=st.lists(slices, min_size=1, max_size=5).map(tuple),
    rows=st.lists(ids, max_size=7).map(tuple),
    full=st.booleans(),
    valid=ids,
    released=st.lists(ids, max_size=4).map(tuple),
    forked=st.lists(forks, max_size=4).map(tuple),
    partitioned=st.booleans(),
)
def test_unpack_is_the_inverse_of_pack(parts, rows, full, valid, released, forked, partitioned) -> None:
    temperatures = tuple(float(np.float32(row / 7)) for row in rows)
    step = Step(parts, rows, temperatures, full, valid, released, forked, partitioned=partitioned)
    assert Step.unpack(step.pack()) == step


def test_tokens_counts_all_slices() -> None:
    step = Step((Slice(0, 0, (1, 2, 3)), Slice(5, 9, (7,))), (3,), (0.5,), False, 10)
    assert step.tokens == 4
