"""The errors that a user can meet, and the exit code of each."""

from __future__ import annotations


class DistMoeError(Exception):
    """A planned error: one clear sentence with what, where, expected, actual and what to do.

    Attributes:
        exit_code: Of a command that it ends.
        agreed: All ranks raise it alike, so none waits for another.
    """

    exit_code = 2
    agreed = False


class UsageError(DistMoeError):
    """Bad input: an option, a file or a prompt (exit code 2)."""


class CheckpointError(DistMoeError):
    """A checkpoint that cannot be read or is not supported (exit code 2)."""


class StoreError(DistMoeError):
    """A store or shard that is missing, damaged, incomplete or of another format (exit code 2)."""


class PlaceError(StoreError):
    """A directory in which a store cannot be written; ends with advice that the command completes by naming another."""


class TraceMismatch(DistMoeError):
    """The model does not say what a trace says (exit code 2)."""


class VerificationFailed(DistMoeError):
    """Numbers that are not what they should be on this machine (exit code 2)."""


class EnvironmentMismatch(DistMoeError):
    """The machine, the MPI library or the ranks do not fit together (exit code 3)."""

    exit_code = 3


class Interrupted(DistMoeError):
    """The user stopped the job (exit code 130), or a scheduler (143 by SIGTERM, 138 by SIGUSR1)."""

    exit_code = 130

    @classmethod
    def by(cls, cause: KeyboardInterrupt, message: str) -> Interrupted:
        """With the exit code of what interrupted."""
        error = cls(message)
        error.exit_code = cause.exit_code if isinstance(cause, Terminated) else cls.exit_code
        return error


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 came where there is no step to finish.

    Attributes:
        exit_code: 128 + the signal's number, as shells report it.
    """

    def __init__(self, number: int) -> None:
        """By the signal of this number."""
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number


class BoundError(DistMoeError):
    """A measurement beats what the machine allows, so that one of our figures is wrong (exit code 1: our bug)."""

    exit_code = 1
