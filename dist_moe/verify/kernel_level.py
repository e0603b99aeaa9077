"""Every kernel at every ISA level of this machine: against the portable level's bits and against float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_moe.kernels import Kernels, isa_levels
from dist_moe.verify.check import Arrays, Check, differing, relative_deviation, same
from dist_moe.verify.family import Family
from dist_moe.verify.matrix_families import matrix_families
from dist_moe.verify.vector_families import vector_families

PORTABLE = "portable"
THREADS = (1, 2, 3)
_LEVEL = "kernel"


def kernel_checks(levels: Sequence[str] | None = None) -> Iterator[Check]:
    """Each kernel in each format against its definition, then each level against the portable one.

    Args:
        levels: ISA levels; None: all that this machine can run.
    """
    with Kernels(threads=1, isa=PORTABLE) as portable:
        families = [*vector_families(), *matrix_families(portable)]
        expected = [family.run(portable) for family in families]
        for family, results in zip(families, expected, strict=True):
            yield _definition(family, results)
    for isa in isa_levels() if levels is None else levels:
        yield from _level(isa, families, expected)


def _definition(family: Family, results: Arrays) -> Check:
    found, wanted = family.view(results), family.define(results)
    if family.tolerance is None:
        return same(_LEVEL, family.name, "definition", found, wanted)
    deviation = max(relative_deviation(one, other) for one, other in zip(found, wanted, strict=True))
    return Check(_LEVEL, family.name, "float64", deviation, family.tolerance)


def _level(isa: str, families: Sequence[Family], expected: Sequence[Arrays]) -> Iterator[Check]:
    """One line where all agree; else one for each kernel that does not."""
    wrong: list[Check] = []
    for threads in THREADS:
        with Kernels(threads=threads, isa=isa) as kernels:
            for family, wanted in zip(families, expected, strict=True):
                count = differing(family.run(kernels), wanted)
                if count:
                    what = f"{family.name}, {isa}, {threads} thread{'s' if threads > 1 else ''}"
                    wrong.append(Check(_LEVEL, what, PORTABLE, float(count), None))
    threads_words = ", ".join(map(str, THREADS[:-1])) + f" and {THREADS[-1]} threads"
    yield from wrong or [Check(_LEVEL, f"all kernels, {isa}, {threads_words}", PORTABLE, 0.0, None)]
