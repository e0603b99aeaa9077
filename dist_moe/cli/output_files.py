"""The files that a command writes: each is one of its own, and none is the model's."""

from __future__ import annotations

from pathlib import Path

from dist_moe.errors import UsageError

_OUTPUTS = ("logits", "output", "routing", "trace", "prompt_cache")


def require_apart(options: object, model_directory: Path) -> None:
    """Refuse outputs that would overwrite each other or a file of the model.

    Args:
        options: Of a command; those of its options that name outputs are looked at.
        model_directory: Where the model's files lie.

    Raises:
        UsageError: Two options name the same file, or one a file in the model's directory that is there.
    """
    model_files = model_directory.resolve()
    named: dict[Path, str] = {}
    for name in _OUTPUTS:
        if (text := getattr(options, name, None)) is None:
            continue
        option, path = "--" + name.replace("_", "-"), Path(text).resolve()
        if path in named:
            raise UsageError(f"{named[path]} and {option} both write {text}: give each a file of its own")
        if path.parent == model_files and path.exists() and name != "prompt_cache":
            raise UsageError(f"{option} {text}: is a file of the model, which would be lost: choose another name")
        named[path] = option
