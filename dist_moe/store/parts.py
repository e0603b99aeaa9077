"""Which files of a store each host gets: what every node needs, and its own shards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dist_moe.errors import UsageError
from dist_moe.store.layout import weight_files
from dist_moe.store.manifest import Manifest, StoreFile

_ALL = "all"


@dataclass(frozen=True)
class HostPart:
    """One host's part of a store; `shards` count from 1, as in their file names."""

    host: str
    shards: tuple[int, ...]
    files: tuple[StoreFile, ...]  # without the manifest

    @property
    def total_bytes(self) -> int:
        """Of all its files."""
        return sum(file.file_bytes for file in self.files)


def host_parts(manifest: Manifest, hosts: Sequence[str], wishes: Sequence[str] = ()) -> list[HostPart]:
    """Give each host its files.

    Args:
        manifest: The store's.
        hosts: Distinct names, in the order of the shards.
        wishes: `HOST=1,2` or `HOST=all` for single hosts, or `all` for all. Without any, shard i goes to host i, and
            the one shard of a store of one node to all.

    Raises:
        UsageError: A wish cannot be read, or names no host or shard; a host or a shard is left over.
    """
    if not wishes:
        owned = _one_each(manifest, hosts)
    elif list(wishes) == [_ALL]:
        owned = {host: tuple(range(1, manifest.nodes + 1)) for host in hosts}
    else:
        owned = _as_wished(manifest, hosts, wishes)
    return [HostPart(host, owned[host], _files(manifest, owned[host])) for host in hosts]


def _one_each(manifest: Manifest, hosts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    if manifest.nodes == 1:
        return dict.fromkeys(hosts, (1,))
    if manifest.nodes != len(hosts):
        raise UsageError(
            f"the store has {manifest.nodes} shards, but there are {len(hosts)} hosts: say who gets what with "
            f"--assign {hosts[0]}=1,2 and so on, or cut it anew with dist-moe reshard --nodes {len(hosts)}"
        )
    return {host: (number,) for number, host in enumerate(hosts, 1)}


def _as_wished(manifest: Manifest, hosts: Sequence[str], wishes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    owned: dict[str, tuple[int, ...]] = {}
    for wish in wishes:
        host, _, numbers = wish.partition("=")
        if not re.fullmatch(r"all|[0-9]{1,5}(,[0-9]{1,5})*", numbers):
            raise UsageError(f"--assign: expected HOST=1,2 or HOST=all, or all alone, found {wish!r}")
        if host not in hosts:
            raise UsageError(f"--assign {wish}: {host!r} is none of the hosts: {', '.join(hosts)}")
        if host in owned:
            raise UsageError(f"--assign {wish}: {host} has its shards already: name it once, with all of them")
        shards = range(1, manifest.nodes + 1) if numbers == _ALL else sorted({int(text) for text in numbers.split(",")})
        if outside := [number for number in shards if not 1 <= number <= manifest.nodes]:
            raise UsageError(f"--assign {wish}: there is no shard {outside[0]}: the store has 1 to {manifest.nodes}")
        owned[host] = tuple(shards)
    if missing := [host for host in hosts if host not in owned]:
        raise UsageError(
            f"--assign says nothing about {', '.join(missing)}: give every host its shards, or leave it out"
        )
    held = {number for shards in owned.values() for number in shards}
    if lost := [number for number in range(1, manifest.nodes + 1) if number not in held]:
        raise UsageError(f"--assign gives no host shard {', '.join(map(str, lost))}: the model could not run")
    return owned


def _files(manifest: Manifest, shards: Sequence[int]) -> tuple[StoreFile, ...]:
    weights = weight_files(manifest)
    others = {name for number, name in enumerate(weights) if number and number not in shards}
    return tuple(file for file in manifest.files if file.name not in others)
