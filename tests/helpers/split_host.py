"""dist-moe on a host that stands for several nodes: 0,0,1 puts ranks 0 and 1 on one node and rank 2 on another.

mpirun -n 3 python tests/helpers/split_host.py 0,0,1 run -p "Once"
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from dist_moe.cli.start import main
from dist_moe.parallel.world import World


def split_host(node_of_rank: list[int]) -> None:
    """Let the worlds of this process find their ranks on these nodes."""

    def host_name(self: World) -> str:
        return f"{socket.gethostname()}-{node_of_rank[self.rank]}"

    def ranks_of_node(self: World) -> Any:
        assert self.comm is not None
        assert len(node_of_rank) == self.size
        return self.comm.Split(node_of_rank[self.rank], self.rank)

    for method in (host_name, ranks_of_node):
        setattr(World, method.__name__, method)


if __name__ == "__main__":
    split_host([int(node) for node in sys.argv.pop(1).split(",")])
    sys.exit(main())
