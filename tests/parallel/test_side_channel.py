"""The TCP channel between the ranks and rank 0, without ranks."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from dist_moe.parallel.progress import Phase
from dist_moe.parallel.side_channel import (
    LEAVING,
    TOKEN_BYTES,
    WELL,
    FollowerChannel,
    LeaderChannel,
    News,
    connect,
    local_addresses,
)
from dist_moe.parallel.stalls import Report

TOKEN = bytes(range(TOKEN_BYTES))
PATIENCE_S = 10.0


@pytest.fixture
def leader() -> Iterator[LeaderChannel]:
    channel = LeaderChannel(3, TOKEN, everywhere=True)
    yield channel
    channel.close()


def join(
    leader: LeaderChannel, rank: int, token: bytes = TOKEN, addresses: tuple[str, ...] = ("127.0.0.1",)
) -> FollowerChannel | None:
    """Connect while rank 0 listens."""
    made: list[FollowerChannel | None] = []
    joining = threading.Thread(target=lambda: made.append(connect(addresses, leader.port, token, rank, PATIENCE_S)))
    joining.start()
    while joining.is_alive():
        leader.wait(0.01)
    return made[0]


def news(leader: LeaderChannel) -> list[News]:
    for _ in range(1000):
        if found := leader.wait(PATIENCE_S / 1000):
            return found
    return []


def test_reports_reach_rank_0_and_words_the_ranks(leader: LeaderChannel) -> None:
    first, second = join(leader, 1), join(leader, 2)
    assert first is not None
    assert second is not None
    report = Report(5, 2, Phase.ATTENTION, waiting=True, still_s=1.5)
    second.report(report)
    assert news(leader) == [News(2, report)]
    leader.say(WELL)
    leader.say(LEAVING)
    for follower in (first, second):
        words = b""
        while len(words) < 2:
            words += follower.wait(PATIENCE_S) or b""
        assert words == WELL + LEAVING
        assert follower.wait(0.0) == b""


def test_a_broken_connection_is_news_on_both_sides() -> None:
    leader = LeaderChannel(3, TOKEN, everywhere=False)
    first, second = join(leader, 1), join(leader, 2)
    assert first is not None
    assert second is not None
    first._connection.close()
    assert news(leader) == [News(1, None)]
    leader.close()
    assert second.wait(PATIENCE_S) is None


@pytest.mark.parametrize("rank", [0, 3, 2**31])
def test_only_ranks_of_the_job_may_join(leader: LeaderChannel, rank: int) -> None:
    assert join(leader, rank) is None


def test_a_wrong_token_and_a_second_rank_1_are_turned_away(leader: LeaderChannel) -> None:
    assert join(leader, 1, token=bytes(TOKEN_BYTES)) is None
    assert join(leader, 1) is not None
    assert join(leader, 1) is None


def test_a_stranger_that_talks_is_dropped_and_one_that_is_silent_harms_nobody(leader: LeaderChannel) -> None:
    with socket.create_connection(("127.0.0.1", leader.port)) as talking:
        silent = socket.create_connection(("127.0.0.1", leader.port))
        talking.sendall(b"GET / HTTP/1.1\r\nHost: someone-who-looks-for-open-ports\r\n\r\n")
        follower = join(leader, 1)
        assert follower is not None
        talking.settimeout(PATIENCE_S)
        assert talking.recv(1) == b""
        silent.close()
        assert leader.wait(0.1) == []


def test_another_program_on_the_port_is_not_rank_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        answering = threading.Thread(target=lambda: stranger.accept()[0].sendall(os.urandom(TOKEN_BYTES)), daemon=True)
        answering.start()
        assert connect(["127.0.0.1"], stranger.getsockname()[1], TOKEN, 1, PATIENCE_S) is None


def test_addresses_that_do_not_answer_cost_only_the_time_out(leader: LeaderChannel) -> None:
    # 192.0.2.1 is reserved for documentation: nobody is there.
    assert join(leader, 1, addresses=("192.0.2.1", "127.0.0.1")) is not None
    assert connect(["192.0.2.1"], leader.port, TOKEN, 2, 0.2) is None


def test_this_hosts_addresses_begin_with_the_loopback() -> None:
    addresses = local_addresses()
    assert addresses[0] == "127.0.0.1"
    assert all(socket.inet_aton(address) for address in addresses)
