"""Collectives over a topology: closed forms, and what must never be."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megapt.plan import communication, hardware
from megapt.plan.communication import Group, group

H100 = hardware.load("h100")
POWERS = st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128])


def test_groups_lie_as_the_mesh_lays_ranks() -> None:
    """Tensor ranks are neighbours; data-parallel ranks of tensor 8 meet one per node, of tensor 2 four per node."""
    assert group(H100, 8, 1) == Group(8, 8, 1)
    assert group(H100, 16, 1) == Group(16, 8, 2)
    assert group(H100, 4, 8) == Group(4, 1, 4)
    assert group(H100, 16, 2) == Group(16, 4, 4)
    assert group(H100, 3, 4) == Group(3, 2, 2)
    assert group(H100, 64, 8).leaves == 2  # 32 nodes below a switch of 64 ports, rail by rail
    assert group(H100.what_if(["network.topology=tree"]), 64, 8).leaves == 16


def test_closed_forms() -> None:
    size, inside = 1e9, 450e9 * 0.8
    ring = H100.launch + 7 * H100.node.latency + size * 7 / 8 / inside
    assert communication.all_gather(H100, group(H100, 8, 1), size) == pytest.approx(ring)
    # Two nodes of four members each: four adapters carry what crosses.
    crossing = H100.launch + H100.network.latency + 6 * H100.node.latency + size * 7 / 8 / (4 * 50e9 * 0.85)
    assert communication.reduce_scatter(H100, group(H100, 8, 2), size) == pytest.approx(crossing)
    # A small all-reduce among 64 nodes climbs a tree of six levels, up and down.
    tiny = H100.launch + 2 * (6 * H100.network.latency + 8.0 * 63 / 64 / (50e9 * 0.85))
    assert communication.all_reduce(H100, group(H100, 64, 8), 8.0) == pytest.approx(tiny)
    assert communication.all_reduce(H100, group(H100, 1, 8), size) == 0
    over = communication.send(H100, 8, 42.5e9)
    assert over == pytest.approx(H100.launch + H100.network.latency + 1.0)
    assert communication.send(H100, 4, 42.5e9) < over / 5
    assert communication.send(H100, 12, 42.5e9) == over


@settings(max_examples=150, deadline=None, derandomize=True)
@given(POWERS, POWERS, st.floats(8, 1e11), st.sampled_from(hardware.names()), st.floats(1, 4))
def test_better_links_are_never_slower(size: int, stride: int, moved: float, name: str, factor: float) -> None:
    assume(size > 1)
    base = hardware.load(name)
    for key in ("network", "node"):
        link = getattr(base, key)
        faster = base.what_if([f"{key}.bandwidth={link.bandwidth * factor}", f"{key}.latency={link.latency / factor}"])
        for how in (communication.all_gather, communication.all_reduce):
            before, after = how(base, group(base, size, stride), moved), how(faster, group(faster, size, stride), moved)
            assert after <= before
        assert communication.send(faster, stride, moved) <= communication.send(base, stride, moved)
    blocked = base.what_if(["network.oversubscription=3"])
    among = group(blocked, size, stride)
    assert communication.all_gather(blocked, among, moved) >= communication.all_gather(base, among, moved)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(POWERS, st.floats(1e6, 1e10))
def test_more_bytes_and_more_nodes_take_longer(size: int, moved: float) -> None:
    assume(size > 1)
    among = group(H100, size, 1)
    for how in (communication.all_gather, communication.all_reduce):
        assert how(H100, among, 2 * moved) > how(H100, among, moved)
        spread = group(H100.what_if(["node.devices=1"]), size, 1)
        assert how(H100, spread, moved) >= how(H100, among, moved)
    assert communication.all_reduce(H100, among, moved) <= 2 * communication.all_gather(H100, among, moved)
