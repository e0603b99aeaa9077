"""A small TCP channel beside MPI: every rank reports to rank 0 once a second, and hears from it, also across hosts.

MPI cannot carry this: its calls belong to the main thread, which may be the one that is stuck.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from dist_moe.parallel.stalls import Report

TOKEN_BYTES = 32
# Rank 0's words: all is well; ranks leave from now on, in good order or because one of them ends the job.
WELL, LEAVING = b"\x01", b"\x02"

_RANK = struct.Struct("!I")
_HELLO_BYTES = TOKEN_BYTES + _RANK.size
_SIOCGIFADDR = 0x8915
_READ_BYTES = 4096


@dataclass(frozen=True)
class News:
    """What rank 0 heard from a rank: a report; None when its connection broke."""

    rank: int
    report: Report | None


@dataclass
class _Peer:
    """A connection to rank 0; `rank` is None until it has shown the token."""

    rank: int | None = None
    received: bytearray = field(default_factory=bytearray)


class LeaderChannel:
    """Rank 0's end: listens, knows its ranks by their token, collects reports, sends words. Used by one thread."""

    def __init__(self, ranks: int, token: bytes, *, everywhere: bool) -> None:
        """Listen on a free port.

        Args:
            ranks: How many ranks there are.
            token: What a rank must show, TOKEN_BYTES long.
            everywhere: Listen on all interfaces, for ranks of other hosts; else on this host alone.
        """
        self._ranks = ranks
        self._token = token
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("" if everywhere else "127.0.0.1", 0), backlog=max(128, ranks))
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.port: int = self._listener.getsockname()[1]
        self._connections: dict[int, socket.socket] = {}

    def wait(self, timeout_s: float) -> list[News]:
        """What the ranks said within so many seconds, in the order in which it arrived; returns at the first news."""
        news: list[News] = []
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            else:
                assert isinstance(key.fileobj, socket.socket)
                news += self._read(key.fileobj, key.data)
        return news

    def say(self, word: bytes) -> None:
        """Send a word to all ranks, from any thread; what a full or broken connection loses is left to `wait`."""
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connection.send(word)

    def close(self) -> None:
        """Close all connections."""
        _close_all(self._selector)
        self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(connection, selectors.EVENT_READ, _Peer())

    def _read(self, connection: socket.socket, peer: _Peer) -> list[News]:
        try:
            data = connection.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        peer.received += data
        if not data or (peer.rank is None and not self._welcome(connection, peer)):
            return self._drop(connection, peer)
        if peer.rank is None:
            return []
        news = []
        while len(peer.received) >= Report.SIZE:
            news.append(News(peer.rank, Report.unpack(bytes(peer.received[: Report.SIZE]))))
            del peer.received[: Report.SIZE]
        return news

    def _welcome(self, connection: socket.socket, peer: _Peer) -> bool:
        """Whether a stranger may stay: it has shown the token, or has not yet said enough."""
        if len(peer.received) < _HELLO_BYTES:
            return True
        token = bytes(peer.received[:TOKEN_BYTES])
        (rank,) = _RANK.unpack_from(peer.received, TOKEN_BYTES)
        if not hmac.compare_digest(token, self._token) or not 0 < rank < self._ranks or rank in self._connections:
            return False
        del peer.received[:_HELLO_BYTES]
        peer.rank = rank
        self._connections[rank] = connection
        with contextlib.suppress(OSError):
            connection.send(self._token[::-1])
        return True

    def _drop(self, connection: socket.socket, peer: _Peer) -> list[News]:
        self._selector.unregister(connection)
        connection.close()
        return [] if peer.rank is None else [News(peer.rank, None)]


class FollowerChannel:
    """Another rank's end."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connection that rank 0 has accepted."""
        self._connection = connection
        self._connection.setblocking(False)

    def report(self, report: Report) -> None:
        """Tell rank 0 where this rank is."""
        with contextlib.suppress(OSError):
            self._connection.send(report.pack())

    def wait(self, timeout_s: float) -> bytes | None:
        """Rank 0's words of the next seconds, b"" if there were none; None when the connection broke."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return b""
        try:
            return self._connection.recv(_READ_BYTES) or None
        except BlockingIOError:
            return b""
        except OSError:
            return None


def connect(addresses: Sequence[str], port: int, token: bytes, rank: int, timeout_s: float) -> FollowerChannel | None:
    """Reach rank 0 on any of its addresses, all tried at once; None if none answers with the token.

    Args:
        addresses: Rank 0's, as it knows them.
        port: Where it listens.
        token: The job's.
        rank: This rank.
        timeout_s: For all of it.
    """
    deadline_s = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for address in addresses:
            attempt = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            attempt.connect_ex((address, port))
            selector.register(attempt, selectors.EVENT_WRITE)
        while selector.get_map() and (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                assert isinstance(key.fileobj, socket.socket)
                selector.unregister(key.fileobj)
                if _introduce(key.fileobj, token, rank, deadline_s):
                    _close_all(selector)
                    return FollowerChannel(key.fileobj)
                key.fileobj.close()
        _close_all(selector)
    return None


def _introduce(connection: socket.socket, token: bytes, rank: int, deadline_s: float) -> bool:
    """Show the token; whether the answer shows that this is rank 0."""
    try:
        connection.settimeout(max(0.01, min(2.0, deadline_s - time.monotonic())))
        connection.sendall(token + _RANK.pack(rank))
        answer = b""
        while len(answer) < TOKEN_BYTES and (data := connection.recv(TOKEN_BYTES - len(answer))):
            answer += data
    except OSError:
        return False
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return hmac.compare_digest(answer, token[::-1])


def _close_all(selector: selectors.BaseSelector) -> None:
    for key in list(selector.get_map().values()):
        assert isinstance(key.fileobj, socket.socket)
        key.fileobj.close()


def local_addresses() -> list[str]:
    """This host's IPv4 addresses, the loopback one first."""
    found = ["127.0.0.1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                reply = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
                found.append(socket.inet_ntoa(reply[20:24]))
    return list(dict.fromkeys(found))
