"""How long collectives and transfers take: latency per hop and bytes over bandwidth, on a topology of nodes.

The alpha-beta model (Hockney 1994; Thakur et al. 2005) of what NCCL runs: rings, which pass through every node once,
and for the latency of small all-reduces trees. Bytes are those of the whole tensor, as in `zero/traffic.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megapt.plan.hardware import Hardware


@dataclass(frozen=True)
class Group:
    """Ranks that communicate. local: how many of them are in one node; nodes: in how many nodes they are; leaves:
    under how many leaf switches."""

    size: int
    local: int
    nodes: int
    leaves: int = 1


def group(hardware: Hardware, size: int, stride: int) -> Group:
    """Of ranks 0, stride, 2 stride and so on: along an axis of the mesh, with tp innermost, then dp, then pp.

    On an axis where some such groups cross a node's border and some do not, all count as if they did.
    """
    devices = hardware.node.devices
    local = min(size, devices // stride) if stride < devices else 1
    nodes = math.ceil(size / max(1, local))
    spanned = math.ceil(stride * size / devices)
    return Group(size, max(1, local), nodes, math.ceil(spanned / hardware.nodes_per_leaf))


def bandwidth(hardware: Hardware, among: Group) -> float:
    """Bytes per second over the slowest link of a ring: each node is entered once, over the adapters of all members
    in it."""
    inside = hardware.node.bandwidth * hardware.node.share * 1e9
    if among.nodes == 1:
        return inside
    outside = among.local * _network(hardware, among.leaves)
    return min(inside, outside) if among.local > 1 else outside


def _network(hardware: Hardware, leaves: int) -> float:
    """Bytes per second of one device's adapter."""
    network = hardware.network
    return network.bandwidth * network.share * 1e9 / (network.oversubscription if leaves > 1 else 1.0)


def all_gather(hardware: Hardware, among: Group, size: float) -> float:
    """Seconds. size: bytes of the gathered tensor. A reduce-scatter of as many bytes takes as long."""
    if among.size == 1:
        return 0.0
    hops = (among.nodes - 1) * hardware.network.latency + (among.size - among.nodes) * hardware.node.latency
    return hardware.launch + hops + _moved(hardware, among, size)


reduce_scatter = all_gather


def all_reduce(hardware: Hardware, among: Group, size: float) -> float:
    """Seconds: a ring, or a tree where that has less latency."""
    if among.size == 1:
        return 0.0
    ring = (among.nodes - 1) * hardware.network.latency + (among.size - among.nodes) * hardware.node.latency
    levels = math.ceil(math.log2(among.nodes))
    tree = levels * hardware.network.latency + (among.local - 1) * hardware.node.latency
    return hardware.launch + 2 * (min(ring, tree) + _moved(hardware, among, size))


def _moved(hardware: Hardware, among: Group, size: float) -> float:
    return size * (among.size - 1) / among.size / bandwidth(hardware, among)


def send(hardware: Hardware, stride: int, size: float) -> float:
    """Seconds of a transfer of `size` bytes to the rank `stride` further on, over the network where any such pair of
    ranks has it between them."""
    devices = hardware.node.devices
    if stride % devices or stride == 0:
        # Ranks of one node, unless the node ends between them.
        inside = devices % (2 * stride) == 0 if stride else True
    else:
        inside = False
    if inside:
        return hardware.launch + hardware.node.latency + size / (hardware.node.bandwidth * hardware.node.share * 1e9)
    leaves = 2 if stride // devices >= hardware.nodes_per_leaf else 1
    return hardware.launch + hardware.network.latency + size / _network(hardware, leaves)
