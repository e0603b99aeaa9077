"""What front end and back end say to each other, and who is let in."""

from __future__ import annotations

import json
import socket
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dist_moe.chat.connection import VARIABLE, Address, Line, LineClosed, Listener, call_front_end
from dist_moe.chat.protocol import (
    PROTOCOL_VERSION,
    ChatMessage,
    Done,
    Generate,
    Hello,
    Note,
    Piece,
    ProtocolError,
    Quit,
    Ready,
    Refused,
    Stop,
    decode,
    encode,
)
from dist_moe.errors import EnvironmentMismatch

MESSAGES: list[ChatMessage] = [
    Hello(PROTOCOL_VERSION, "token"),
    Ready("a model", 4, 32768, "switchable", True, 0.7),
    Generate([{"role": "user", "content": "two\nlines, ü, \x1b"}], [], "auto", 7),
    Stop(),
    Quit(),
    Piece("thinks", "reasoning"),
    Note("a call was kept as text"),
    Done({"role": "assistant", "content": "yes"}, "stop", "", 12, 3, 4, 0.5, 1),
    Refused("too long"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_every_message_is_one_line_and_comes_back(message: ChatMessage) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode(line) == message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"no json\n", "not JSON"),
        (b"[1]\n", "unknown message"),
        (b'{"type": "shout"}\n', "unknown message"),
        (b'{"type": ["stop"]}\n', "unknown message"),
        (b'{"type": "piece", "text": "x"}\n', "missing or unknown fields kind"),
        (b'{"type": "stop", "now": true}\n', "missing or unknown fields now"),
        (b'{"type": "note", "text": 5}\n', "note: text: expected str, found 5"),
        (b'{"type": "hello", "version": true, "token": ""}\n', "hello: version: expected int, found True"),
    ],
)
def test_another_version_is_told(line: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words) as caught:
        decode(line)
    assert caught.value.exit_code == 3


@pytest.fixture(params=["unix", "tcp"])
def listener(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Listener:
    """A front end's place of either kind."""
    return Listener(tmp_path_factory.mktemp("s"), ["127.0.0.1"] if request.param == "tcp" else [])


def test_both_ends_meet_and_the_end_of_one_is_seen(listener: Listener) -> None:
    address = Address.from_environment({VARIABLE: listener.address.to_environment()})
    assert address == listener.address
    found: list[Line] = []
    thread = threading.Thread(target=lambda: found.append(call_front_end(listener.address)))
    thread.start()
    line = listener.accept(30)
    thread.join()
    assert line is not None
    for message in MESSAGES:
        found[0].send(message)
    assert [line.receive() for _ in MESSAGES] == MESSAGES
    line.close()
    with pytest.raises(LineClosed):
        found[0].receive()
    listener.close()


def test_the_socket_is_its_owners_alone(tmp_path: Path) -> None:
    listener = Listener(tmp_path)
    assert stat.S_IMODE(Path(listener.address.path).stat().st_mode) == 0o600
    listener.close()
    assert not list(tmp_path.iterdir())


def test_a_stranger_is_not_let_in(listener: Listener) -> None:
    stranger = replace(listener.address, rank_token="guess")
    refusals: list[Exception] = []

    def call() -> None:
        try:
            call_front_end(stranger)
        except EnvironmentMismatch as error:
            refusals.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert listener.accept(30) is None
    thread.join()
    assert "cannot reach the chat's front end" in str(refusals[0])
    listener.close()


def test_rank_0_does_not_talk_to_a_stranger(listener: Listener) -> None:
    thread = threading.Thread(target=lambda: listener.accept(30))
    thread.start()
    with pytest.raises(EnvironmentMismatch, match="not this chat's front end"):
        call_front_end(replace(listener.address, front_token="another"))
    thread.join()
    listener.close()


def test_a_front_end_that_is_gone_is_told_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(EnvironmentMismatch, match=f"tried 127.0.0.1:{port} .*Connection refused.*firewall") as caught:
        call_front_end(Address("", ("127.0.0.1",), port, "a", "b"))
    assert caught.value.exit_code == 3


def test_another_version_at_the_other_end() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(json.dumps({"type": "hello", "version": 99, "token": "b"}).encode() + b"\n")
    with pytest.raises(ProtocolError, match="speak protocols 1 and 99"):
        Line(ours).introduce("a", "b", speaks_first=True)


def test_a_variable_of_somebody_else() -> None:
    assert Address.from_environment({}) is None
    for text in ("", "{}", "[1]", '{"hosts": []}'):
        with pytest.raises(ProtocolError, match=VARIABLE):
            Address.from_environment({VARIABLE: text})
