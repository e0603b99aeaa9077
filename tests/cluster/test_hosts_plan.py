"""`dist-moe plan --net measured` on hosts of a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from helpers.cluster import Cluster

MODEL = Path(__file__).parents[2] / "configs" / "qwen3-30b-a3b.toml"
PLAN = (sys.executable, "-m", "dist_moe", "plan", str(MODEL), "--net", "measured", "--memory", "64", "-o", "json")


def test_hosts_and_their_network_are_measured() -> None:
    with Cluster(2, rate="1gbit") as cluster:
        done = cluster.mpirun((1, 1), *PLAN, "--bandwidth", "20", env={"DIST_MOE_THREADS": "1"})
        assert done.code == 0, done.output
        found = json.loads(done.stdout)
        assert {way["nodes"] for way in found["ways"]} == {1, 2}
        assert (found["net"], found["ranks_per_node"], found["read_gb_s"]) == ("measured", 1, 20)
        assert found["latency_us"] > 0
        assert 0 < found["link_gb_s"] < 0.15  # a shaped link is not quicker than its rate, but for the bucket
        # No host's memory is enough: said once, by all alike.
        refused = cluster.mpirun((1, 1), *PLAN, "--memory", "2", "--bandwidth", "20")
        assert refused.code == 2, refused.output
        assert refused.stderr.count("does not fit on 2 nodes of 2.0 GB") == 1
