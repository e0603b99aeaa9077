"""A cut cable, a stopped or killed rank or launcher on another host: the cause is named in time and nothing is left."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from helpers.cluster import Cluster, HostsJob
from helpers.jobs import HANGS, Ended, faulty, slow
from helpers.launching import flavour

pytestmark = pytest.mark.cluster

STALL_S = 5
# Generous: the machine may be busy. A job that hangs would take for ever.
MUST_END_WITHIN_S = 60
TIMEOUTS = ("--stall-timeout", str(STALL_S), "--start-timeout", "30")
PROXIES = ("hydra_pmi_proxy", "prted")
LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun")
DIED = "dist-moe: error: rank {} on host{} has died (killed, perhaps for want of memory, or crashed)"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two hosts that have packed the demo model."""
    with Cluster(2) as made:
        done = made.mpirun((1, 1), *faulty("none", "decode", 0, "-n", "2"))
        assert done.code == 0, done.output
        yield made


def end(
    cluster: Cluster, how: Callable[[HostsJob], None], ranks: tuple[int, int] = (1, 1), command: Sequence[str] = ()
) -> Ended:
    """Start a long story, do something to it once it is being told, and see how it ends."""
    with cluster.start(ranks, *(command or slow(*TIMEOUTS))) as job:
        if not command:
            job.wait_for_text()
        elif "hang" in command:
            job.wait_for(lambda: HANGS in job.stderr())
        time.sleep(1.5)  # all ranks have reported from where they are
        how(job)
        ended = job.end(MUST_END_WITHIN_S)
    assert not ended.left, ended
    return ended


def only_line(ended: Ended) -> str:
    (line,) = ended.lines
    return line


@pytest.fixture
def mended(cluster: Cluster) -> Iterator[None]:
    """Cables are put back."""
    yield
    for host in range(len(cluster.hosts)):
        cluster.mend(host)


def needs_hydra() -> None:
    if flavour() == "openmpi":
        pytest.skip("prterun waits for its daemon on a host that it cannot reach")


@pytest.mark.parametrize("host", [0, 1])
def test_a_cut_cable_while_it_tells(cluster: Cluster, mended: None, host: int) -> None:
    needs_hydra()
    ended = end(cluster, lambda job: cluster.cut(host), (2, 1))
    assert ended.code == 75, ended
    silence = (
        r"dist-moe: error: rank 2 on host1 has been silent for [5-9] s \(--stall-timeout\), last seen in step \d+, "
    )
    assert re.match(silence, only_line(ended)), ended


def test_a_cut_cable_while_it_reads_the_prompt(cluster: Cluster, mended: None) -> None:
    needs_hydra()
    ended = end(cluster, lambda job: cluster.cut(1), command=faulty("hang", "prefill", 0, *TIMEOUTS))
    assert ended.code == 75, ended
    assert "rank 1 on host1 has been silent for " in only_line(ended), ended
    assert "last seen in step 1, " in only_line(ended), ended


def test_a_cut_cable_while_it_loads(cluster: Cluster, mended: None) -> None:
    needs_hydra()
    ended = end(cluster, lambda job: cluster.cut(1), command=faulty("hang", "load", 0, *TIMEOUTS))
    assert ended.code == 75, ended
    assert "rank 1 on host1 has been silent for " in only_line(ended), ended


@pytest.mark.parametrize("rank", [1, 2])
def test_a_stopped_rank_on_another_host(cluster: Cluster, rank: int) -> None:
    ended = end(cluster, lambda job: job.hit(job.ranks()[rank], signal.SIGSTOP), (1, 2))
    assert ended.code == 75, ended
    assert f"rank {rank} on host1 has been silent for " in only_line(ended), ended


def test_a_stopped_first_rank_is_missed_on_the_other_host(cluster: Cluster) -> None:
    ended = end(cluster, lambda job: job.hit(job.ranks()[0], signal.SIGSTOP))
    assert ended.code == 75, ended
    assert "rank 1 on host1 has had no word from rank 0 on host0 for 5 s" in only_line(ended), ended


@pytest.mark.parametrize(("ranks", "rank", "host"), [((1, 1), 1, 1), ((1, 1), 0, 0), ((2, 2), 3, 1), ((2, 2), 2, 1)])
def test_a_killed_rank(cluster: Cluster, ranks: tuple[int, int], rank: int, host: int) -> None:
    ended = end(cluster, lambda job: job.hit(job.ranks()[rank], signal.SIGKILL), ranks)
    if flavour() == "openmpi":
        # prterun is first and names the rank, or Open MPI in a rank whose peer is gone: "Socket closed".
        named = f"process rank {rank} with PID" in ended.stderr and f"on node host{host} exited on" in ended.stderr
        assert (ended.code == 137 and named) or (ended.code == 14 and "Socket closed" in ended.stderr), ended
    else:
        assert ended.code in (9, 255), ended  # Hydra ends in one way or another when ranks are on several hosts
        assert only_line(ended) == DIED.format(rank, host), ended


def test_a_killed_proxy_of_another_host(cluster: Cluster) -> None:
    ended = end(cluster, lambda job: job.hit(pid(cluster, 1, PROXIES), signal.SIGKILL))
    assert ended.code != 0, ended
    if flavour() == "mpich":
        assert only_line(ended) == DIED.format(1, 1), ended


def test_a_killed_mpirun_leaves_nothing_on_any_host(cluster: Cluster) -> None:
    ended = end(cluster, lambda job: job.hit(pid(cluster, 0, LAUNCHERS), signal.SIGKILL), (2, 2))
    assert ended.code in (-9, 137), ended


@pytest.mark.parametrize(("phase", "place"), [("load", "loading the model"), ("decode", "layer 1, experts")])
def test_a_rank_that_hangs_on_another_host(cluster: Cluster, phase: str, place: str) -> None:
    ended = end(cluster, lambda job: None, command=faulty("hang", phase, 1, *TIMEOUTS))
    assert ended.code == 75, ended
    stall = "nothing has moved for 5 s (--stall-timeout): all wait for rank 1 on host1, which is stuck in "
    assert stall in only_line(ended), ended
    assert only_line(ended).endswith(place), ended


def test_an_exception_on_another_host(cluster: Cluster) -> None:
    ended = end(cluster, lambda job: None, command=faulty("raise", "decode", 1, *TIMEOUTS))
    assert ended.code == 1, ended
    assert only_line(ended) == "dist-moe: internal error on rank 1 (host1): RuntimeError: broken on purpose", ended


def pid(cluster: Cluster, host: int, names: Sequence[str]) -> int:
    """The process of a launcher on a host."""
    return next(process.pid for process in cluster.processes(host) if process.name() in names)
