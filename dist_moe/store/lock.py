"""One writer per store: an exclusive lock on a file in its directory, released by the system if the writer dies."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_moe.errors import PlaceError

LOCK_NAME = ".lock"

_POLL_S = 0.2


@contextmanager
def store_lock(directory: Path, on_wait: Callable[[], None] | None) -> Iterator[None]:
    """Hold the lock of a store.

    Args:
        directory: The store; it exists.
        on_wait: Called about five times a second while another process holds the lock; None does not wait.

    Raises:
        PlaceError: Another process is writing this store and `on_wait` is None, or the file system cannot lock.
    """
    path = directory / LOCK_NAME
    while True:
        descriptor = _open(path)
        try:
            if _try_lock(descriptor, path) and _is_same_file(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if on_wait is None:
            raise PlaceError(f"{directory}: another process is writing this store; wait for it")
        on_wait()
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        # Removed while it is held: whoever opened the old file sees that the name is gone and tries again.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def mark_used(file: Path) -> int | None:
    """Say that this process reads a store, until the descriptor that is returned is closed or the process ends.

    Args:
        file: Of the store; its manifest.

    Returns:
        The descriptor, or None where the file system cannot lock: then nobody is kept from removing the store.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def refuse_used(file: Path) -> None:
    """Make sure that no process of this host (or of any, where the file system shares locks) has marked a store.

    Raises:
        PlaceError: One has.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # there is nothing that could be marked
    try:
        if not _try_lock(descriptor, file):
            raise PlaceError(f"{file.parent}: a run is using this store; wait for its end")
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise PlaceError(f"{path}: cannot be written ({error.strerror}); allow writing there") from None


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise PlaceError(
            f"{path}: this file system cannot lock files ({error.strerror}); mount it with locking"
        ) from None
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
