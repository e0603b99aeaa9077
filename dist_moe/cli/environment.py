"""Variables that look like ours but do nothing: a typo in the environment is said, as one in a config file is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

PREFIX = "DIST_MOE_"
SWITCHES = ("DIST_MOE_MPI_SUM", "DIST_MOE_SHARED_MEMORY", "DIST_MOE_YIELD")
# Not options: where packed models are kept, where a chat's ranks find it, the kernels' instruction set, the build's
# warnings.
OTHERS = ("DIST_MOE_CACHE", "DIST_MOE_CHAT_LINE", "DIST_MOE_ISA", "DIST_MOE_WERROR")
_OF_TESTS = "DIST_MOE_TEST_"


def environment_warnings(environ: Mapping[str, str], options: Iterable[str]) -> list[str]:
    """One sentence for every variable that is ignored.

    Args:
        environ: The environment.
        options: The variables of the commands' options.
    """
    known = sorted({*SWITCHES, *OTHERS, *options})
    warnings = []
    for name in sorted(name for name in environ if name.startswith(PREFIX) and not name.startswith(_OF_TESTS)):
        if name not in known:
            (nearest,) = difflib.get_close_matches(name, known, 1, 0.6) or [""]
            advice = f"did you mean {nearest}?" if nearest else "the options' names follow DIST_MOE_"
            warnings.append(f"the environment variable {name} is unknown and ignored: {advice}")
        elif name in SWITCHES and environ[name] not in ("", "0", "1"):
            warnings.append(f"{name}={environ[name]} is ignored: expected 0 or 1")
    return warnings
