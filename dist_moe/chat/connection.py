"""The line between front end and rank 0: a Unix socket on one host, TCP between two, and tokens on both sides.

Rank 0 comes to the front end, so that a front end behind a firewall of its own needs one open port at most, and the
end of either process is seen at once by the other as the end of the stream.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_moe.chat.protocol import (
    LARGEST_LINE_BYTES,
    PROTOCOL_VERSION,
    ChatMessage,
    Hello,
    ProtocolError,
    decode,
    encode,
)
from dist_moe.errors import EnvironmentMismatch

# The environment alone carries it: a command line can be read by everybody on the host.
VARIABLE = "DIST_MOE_CHAT_LINE"
_READ_BYTES = 1 << 16
_INTRODUCED_WITHIN_S = 5.0


class LineClosed(Exception):
    """The other end is gone."""


@dataclass(frozen=True)
class Address:
    """Where the front end listens, and the tokens by which the two know each other.

    Attributes:
        path: Of the Unix socket; "" for TCP.
        hosts: IPv4 addresses and names of the front end's host, for TCP.
        port: For TCP.
        rank_token: What rank 0 shows.
        front_token: What the front end shows.
    """

    path: str
    hosts: tuple[str, ...]
    port: int
    rank_token: str
    front_token: str

    def to_environment(self) -> str:
        """The value of VARIABLE."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Address | None:
        """What `to_environment` wrote; None where nothing was.

        Raises:
            ProtocolError: The variable holds something else.
        """
        text = environ.get(VARIABLE)
        if text is None:
            return None
        try:
            value = json.loads(text)
            return cls(**{**value, "hosts": tuple(value["hosts"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ProtocolError(f"{VARIABLE} is not what a dist-moe of this version sets: unset it") from error


class Line:
    """One connected end; `send` may be called while another thread is inside `receive`."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connection."""
        self._connection = connection
        self._received = bytearray()

    def fileno(self) -> int:
        """For select: readable when a message or the end has come."""
        return self._connection.fileno()

    def send(self, message: ChatMessage) -> None:
        """Send a message.

        Raises:
            LineClosed: The other end is gone.
        """
        try:
            self._connection.sendall(encode(message))
        except OSError as error:
            raise LineClosed from error

    def receive(self) -> ChatMessage:
        """Wait for the next message.

        Raises:
            LineClosed: The other end is gone.
            ProtocolError: It says something unknown, or a message without an end.
        """
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > LARGEST_LINE_BYTES:
                raise ProtocolError(f"chat protocol: a message is longer than {LARGEST_LINE_BYTES >> 20} MB")
            try:
                data = self._connection.recv(_READ_BYTES)
            except OSError as error:
                raise LineClosed from error
            if not data:
                raise LineClosed
            self._received += data
        text = bytes(self._received[:end])
        del self._received[: end + 1]
        return decode(text)

    def introduce(self, own_token: str, other_token: str, *, speaks_first: bool) -> None:
        """Show a token and see the other's; the caller speaks first, so that a stranger learns no token.

        Raises:
            LineClosed: The other end is gone, says nothing in time, or has another token.
            ProtocolError: It speaks another version.
        """
        self._connection.settimeout(_INTRODUCED_WITHIN_S)
        own = Hello(PROTOCOL_VERSION, own_token)
        if speaks_first:
            self.send(own)
        hello = self.receive()
        if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token.encode(), other_token.encode()):
            raise LineClosed
        if not speaks_first:
            self.send(own)
        if hello.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the chat's two ends speak protocols {PROTOCOL_VERSION} and {hello.version}: "
                "install the same version of dist-moe on all hosts"
            )
        self._connection.settimeout(None)

    def close(self) -> None:
        """Hang up, also under a thread that is inside `receive`."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Listener:
    """The front end's place, where rank 0 will call."""

    def __init__(self, directory: Path, hosts: Sequence[str] = ()) -> None:
        """Listen.

        Args:
            directory: A private one, for a Unix socket.
            hosts: This host's addresses, if rank 0 may run elsewhere: TCP on a free port of all interfaces.
        """
        tokens = (secrets.token_hex(32), secrets.token_hex(32))
        if hosts:
            self._socket = socket.create_server(("", 0))
            self.address = Address("", tuple(hosts), self._socket.getsockname()[1], *tokens)
        else:
            path = directory / "rank0"
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.bind(str(path))
            path.chmod(0o600)
            self._socket.listen()
            self.address = Address(str(path), (), 0, *tokens)

    def accept(self, timeout_s: float) -> Line | None:
        """Rank 0's line; None if it has not called within so long.

        Raises:
            ProtocolError: It is of another version.
        """
        self._socket.settimeout(timeout_s)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return None
        line = Line(connection)
        try:
            line.introduce(self.address.front_token, self.address.rank_token, speaks_first=False)
        except LineClosed:  # a stranger
            line.close()
            return None
        return line

    def close(self) -> None:
        """Stop listening; lines stay open."""
        self._socket.close()
        if self.address.path:
            Path(self.address.path).unlink(missing_ok=True)


def call_front_end(address: Address, timeout_s: float = 10.0) -> Line:
    """Rank 0: reach the front end that started this job.

    Raises:
        EnvironmentMismatch: It cannot be reached.
        ProtocolError: It is of another version.
    """
    deadline_s = time.monotonic() + timeout_s
    places: list[str | tuple[str, int]] = [(host, address.port) for host in address.hosts] or [address.path]
    reasons: list[str] = []
    while places and time.monotonic() < deadline_s:
        place = places.pop(0)
        try:
            return _call(place, address, max(0.1, min(2.0, deadline_s - time.monotonic())))
        except LineClosed:
            reasons.append(f"{_show(place)} (not this chat's front end)")
        except OSError as error:
            reasons.append(f"{_show(place)} ({error.strerror or error})")
    raise EnvironmentMismatch(
        f"rank 0 on {socket.gethostname()} cannot reach the chat's front end: tried {', '.join(reasons)}; a firewall "
        "in the way? Start dist-moe chat on the first host of the host file, or let TCP from there through"
    )


def _call(place: str | tuple[str, int], address: Address, timeout_s: float) -> Line:
    if isinstance(place, str):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(place)
    else:
        connection = socket.create_connection(place, timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line = Line(connection)
    try:
        line.introduce(address.rank_token, address.front_token, speaks_first=True)
    except BaseException:
        line.close()
        raise
    return line


def _show(place: str | tuple[str, int]) -> str:
    return place if isinstance(place, str) else f"{place[0]}:{place[1]}"
