"""Where nodes stand: their order, and which of several equal ones lie together. Pure.

A node's labels name the domains that it is in, from the widest to the closest: `rail` (a group of racks under the same
rail switches), `rack`, `nvlink` (an NVLink or xGMI domain). Neighbours in the order of nodes are neighbours in the
network, so ranks that are numbered along it talk over short ways.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from ipaddress import ip_address

LEVELS = ("rail", "rack", "nvlink")
"""Labels that name domains, the widest first."""

Path = tuple[tuple[object, ...], ...]
"""A node's domains as sortable keys, the widest first."""
_NOWHERE: Path = ((), (), ())


def domain_path(labels: Mapping[str, str]) -> Path:
    """The domains that a node with these labels is in; those without a label are in one together."""
    if not labels:
        return _NOWHERE
    return _domain_path(*[labels.get(level, "") for level in LEVELS])


@lru_cache(maxsize=1 << 16)
def _domain_path(*names: str) -> Path:
    return tuple(_natural_key(name) for name in names)


def _natural_key(name: str) -> tuple[object, ...]:
    """Sorts `rack2` before `rack10`: numbers by value, and before words."""
    words = re.split(r"(\d+)", name)
    return tuple((0, int(word), "") if word.isdecimal() else (1, 0, word) for word in words if word)


@lru_cache(maxsize=1 << 16)
def address_key(name: str) -> tuple[object, ...]:
    """Sorts addresses as numbers, since neighbours under one switch have neighbouring ones, and host names after them.

    A Ray node that was started with `--node-ip-address=gpu-07` has that name for its address.
    """
    try:
        return 0, int(ip_address(name))
    except ValueError:
        return 1, *_natural_key(name)


def closest_nodes(
    count: int, among: Sequence[int], paths: Sequence[Path], used: Collection[int]
) -> list[int]:
    """`count` of several nodes that serve equally well, as close together as they come.

    They lie in one domain of the closest level that has one with so many; of several, in one that is in use by this gang,
    then the one with the fewest others, so that larger ones stay whole. Where no domain holds them, as few as do, the
    largest first. Inside the closest domain, the lowest in the order.

    Args:
        count: how many, at most `len(among)`.
        among: indices of nodes, ascending.
        paths: domains of all nodes, by index.
        used: nodes that the gang has already.
    """
    if count == len(among):
        return list(among)
    if count == 0:
        return []
    if paths[among[0]] == paths[among[-1]]:  # indices go by domain, so all between are in it too
        return list(among[:count])
    touched = {paths[index][:depth] for index in used for depth in range(1, len(LEVELS) + 1)}
    for depth in range(len(LEVELS), -1, -1):
        able = [group for group in _domains(among, paths, depth) if len(group) >= count]
        if able:
            group = min(able, key=lambda g: (paths[g[0]][:depth] not in touched, len(g), g[0]))
            return _gather(count, group, paths, depth + 1, touched, used)
    raise AssertionError("all nodes together are one domain of depth 0")


def _gather(
    count: int, group: Sequence[int], paths: Sequence[Path], depth: int, touched: set[Path], used: Collection[int]
) -> list[int]:  # fmt: skip
    """`count` nodes of a domain, from as few of the domains inside it as hold them."""
    if depth > len(LEVELS):
        return list(group[:count])
    inner = sorted(
        _domains(group, paths, depth), key=lambda g: (paths[g[0]][:depth] not in touched, -len(g), g[0])
    )
    taken: list[int] = []
    for domain in inner:
        left = count - len(taken)
        if len(domain) < left:
            taken += domain
            continue
        rest = sorted(set(group) - set(taken))
        return sorted([*taken, *closest_nodes(left, rest, paths, [*used, *taken])])
    return sorted(taken)


def _domains(among: Sequence[int], paths: Sequence[Path], depth: int) -> list[list[int]]:
    """The nodes by their domain at a level; depth 0: all of them."""
    domains: dict[Path, list[int]] = {}
    for index in among:
        domains.setdefault(paths[index][:depth], []).append(index)
    return list(domains.values())
