"""The only importer of huggingface_hub: a model's id becomes the directory of its snapshot in the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from dist_moe import files
from dist_moe.checkpoint.reader import TEXT_FILES
from dist_moe.checkpoint.tensor_files import INDEX
from dist_moe.errors import CheckpointError, EnvironmentMismatch, Interrupted, UsageError

# What `Checkpoint` reads: a repository may hold the weights a second time in other formats.
WANTED = [*TEXT_FILES, INDEX, "model*.safetensors", "additional_chat_templates/*.jinja"]
PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MODEL_ID = re.compile(rf"({PART}/{PART})(?:@({PART}))?")


def is_hub_id(source: str) -> bool:
    """Whether a source is ORG/NAME or ORG/NAME@REVISION and no path: neither it nor a directory ORG is here.

    Raises:
        UsageError: The system does not say what stands there.
    """
    path = Path(source)
    return MODEL_ID.fullmatch(source) is not None and not files.exists(path) and not files.exists(path.parent)


def download(source: str, quiet: bool = False) -> Path:
    """The directory of a model of the hub; what is missing of it is downloaded, an interrupted download continued.

    Args:
        source: Its id, for which `is_hub_id` holds.
        quiet: Show no progress.

    Raises:
        EnvironmentMismatch: huggingface_hub is not installed.
        UsageError: The hub has no such model, or does not give it to everybody.
        CheckpointError: It cannot be downloaded now.
        Interrupted: The user stopped it.
    """
    hub = require_hub(source)
    match = MODEL_ID.fullmatch(source)
    assert match is not None
    name, revision = match.groups()
    if quiet:
        hub.utils.disable_progress_bars()
    refusals = hub.errors.GatedRepoError, hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError
    failures = OSError, ValueError, getattr(hub.errors, "HTTPError", OSError)
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except KeyboardInterrupt:
        raise Interrupted(f"{source}: interrupted; repeat the same command to continue the download") from None
    except refusals as error:
        raise UsageError(
            f"{source}: there is no such file or directory here, and the Hugging Face hub does not give a model of "
            f"this name and revision ({_reason(error)}): check the spelling, or log in with: hf auth login"
        ) from error
    except failures as error:
        raise CheckpointError(
            f"{source}: there is no such file or directory here, and it cannot be downloaded from the Hugging Face hub "
            f"({_reason(error)}): repeat the command when there is network and room, it continues where it stopped, or "
            f"copy the model here and give its directory"
        ) from error


def require_hub(source: str) -> ModuleType:
    """The package; raises EnvironmentMismatch unless it is installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise EnvironmentMismatch(
            f"{source}: there is no such file or directory here, and downloading a model needs the package "
            "huggingface_hub: pip install 'dist-moe[hub]' (or pip install huggingface_hub)"
        ) from error
    found: ModuleType = huggingface_hub
    return found


def _reason(error: Exception) -> str:
    """The first line of what the library says."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
