"""Kill a random rank, or the launcher, of a job at a random moment, N times, and see that each job ends cleanly.

    PYTHONPATH=tests python tests/helpers/random_kills.py 200 [--seed 1] [--ranks 4]

Prints one line per kill and a summary; exits with 1 if a job did not end, left a process or shared memory, or ended
as if all were well. A few of these are run by tests/parallel/test_random_kills.py.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from helpers.jobs import Ended, Job, faulty

END_WITHIN_S = 60.0
# From the launcher's start over the ranks' start and load into the story, which goes on for 20 s.
LATEST_KILL_S = 4.0


@dataclass(frozen=True)
class Kill:
    """One job's fate: who was hit, when, and how it ended."""

    victim: str
    after_s: float
    ended: Ended

    @property
    def clean(self) -> bool:
        """Whether all ended, with a failure's code and nothing left."""
        return self.ended.code != 0 and not self.ended.left

    def __str__(self) -> str:
        """One line."""
        said = self.ended.lines[0] if self.ended.lines else "-"
        return (
            f"{self.victim:8} after {self.after_s:.2f} s: code {self.ended.code}, "
            f"{self.ended.seconds:.2f} s to the end, left {list(self.ended.left)}, said {said}"
        )


def random_kills(count: int, ranks: int, seed: int) -> Iterator[Kill]:
    """Start and kill so many jobs, one after the other."""
    random_source = random.Random(seed)
    with tempfile.TemporaryDirectory() as cache:
        env = {"DIST_MOE_CACHE": cache, "DIST_MOE_YIELD": "1"}
        with Job(ranks, *faulty("none", "decode", 0, "-n", "2"), env=env) as job:
            assert job.end(END_WITHIN_S).code == 0
        for _ in range(count):
            yield _kill(random_source, ranks, env)


def _kill(random_source: random.Random, ranks: int, env: dict[str, str]) -> Kill:
    victim = random_source.choice(["mpirun", *range(ranks)])
    after_s = random_source.uniform(0.0, LATEST_KILL_S)
    with Job(ranks, *faulty("slow", "decode", 0, "-n", "400", "--stall-timeout", "10"), env=env) as job:
        time.sleep(after_s)
        pid = job.process.pid
        if victim != "mpirun":
            job.wait_for(lambda: victim in job.ranks())
            pid = job.ranks()[victim]
        job.hit(pid, signal.SIGKILL)
        return Kill(str(victim), after_s, job.end(END_WITHIN_S))


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    kills = []
    for kill in random_kills(options.count, options.ranks, options.seed):
        print(kill, flush=True)
        kills.append(kill)
    clean = sum(kill.clean for kill in kills)
    longest_s = max((kill.ended.seconds for kill in kills), default=0.0)
    print(f"{clean} of {len(kills)} clean ends, the longest took {longest_s:.1f} s")
    return 0 if clean == options.count else 1


if __name__ == "__main__":
    sys.exit(main())
