"""The .npz file of `perplexity --kl-base`: a reference's logits at every predicted token, float32 [tokens, vocabulary].

Beside them `targets` int32 [tokens], the tokens that were predicted, and `facts`: the format's version and the model's
name as JSON. Logits are kept whole, so that a store compared with itself has a divergence of exactly 0.

Shape suffixes: N positions, V vocabulary.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.cli.npz_arrays import NpzArrays
from dist_moe.cli.npz_reading import RowStream, open_npz, read_array
from dist_moe.errors import UsageError

FORMAT_VERSION = 1
_WHAT = "the logits of a reference"
_MAKE_ONE = "name a new file to write one, with the reference's store"


def new_base(path: Path, model_name: str, targets_N: npt.NDArray[np.int32]) -> NpzArrays:
    """A base to be written, by `append({"logits": rows_NV})`; UsageError if it cannot be."""
    facts = json.dumps({"format_version": FORMAT_VERSION, "model": model_name}, ensure_ascii=False)
    return NpzArrays(path, {"facts": np.array(facts), "targets": targets_N})


class KlBase:
    """A base on disk, read once from its first row to its last; a context manager.

    Attributes:
        model_name: Which model it is of.
    """

    def __init__(self, path: Path, targets_N: npt.NDArray[np.int32], vocabulary: int) -> None:
        """Check that it is of the same predicted tokens.

        Raises:
            UsageError: It cannot be read, is something else, or is of another text or vocabulary.
        """
        self._path, self._stack = path, ExitStack()
        with open_npz(path, _WHAT, _MAKE_ONE) as archive:
            facts: dict[str, Any] = dict(json.loads(str(read_array(archive, "facts"))))
            if facts.get("format_version") != FORMAT_VERSION:
                raise UsageError(f"{path}: a base of another version than {FORMAT_VERSION}: write it again")
            self.model_name = str(facts["model"])
            found_N, rows = read_array(archive, "targets"), RowStream.open(archive, "logits")
            if rows.shape != (len(found_N), rows.shape[-1]) or rows.dtype != np.float32:
                raise ValueError(f"logits of {rows.shape} {rows.dtype} do not fit {len(found_N)} tokens")
        if rows.shape[1] != vocabulary:
            raise UsageError(
                f"{path}: is of a model with {rows.shape[1]} tokens, this one has {vocabulary}: compare models that "
                "share a tokenizer"
            )
        if not np.array_equal(found_N, targets_N):
            raise UsageError(
                f"{path}: was written for another text, or with another --window, --stride or --split "
                f"({len(found_N)} predicted tokens, here {len(targets_N)}): give the same, or {_MAKE_ONE}"
            )

    def rows(self, count: int) -> npt.NDArray[np.float32]:
        """The next rows, f32 [count, V]; UsageError if the file is damaged."""
        return self._rows.read(count)

    def __enter__(self) -> KlBase:
        """Open it for reading."""
        archive = self._stack.enter_context(open_npz(self._path, _WHAT, _MAKE_ONE))
        self._rows = RowStream.open(archive, "logits")
        return self

    def __exit__(self, *error: Any) -> bool | None:
        """Close it; what a damaged row caused becomes one sentence."""
        return self._stack.__exit__(*error)
