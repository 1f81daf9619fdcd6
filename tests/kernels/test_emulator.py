"""The emulator runs CUDA kernels as a GPU does, and shows the bugs that a GPU hides or dies of."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megapt_kernels import build
from tests.kernels.guarded import guarded, sparse
from tests.kernels.planted import ORDERS, Emulated, Order, compiled, planted

CASES = Path(__file__).parent / "emulator_cases" / "cases.cu"


def _compiled(folder: Path, *flags: str, races: bool = False) -> Emulated:
    try:
        return compiled(CASES, folder / "cases.so", flags, races)
    except build.ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return _compiled(tmp_path_factory.mktemp("cases"))


@pytest.fixture(params=ORDERS, ids=lambda order: order.name)
def emulated(request: pytest.FixtureRequest, cases: Emulated) -> Emulated:
    """The cases in each order of threads."""
    cases.order(request.param, seed=3)
    return cases


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _run(library: Emulated, name: str, *arguments: object) -> None:
    code = library.call(name, *arguments)
    assert (code, library.error()) == (0, "")


def _tree_sum_is_right(library: Emulated, bug: bool) -> bool:
    x, y = _random(3, 1000), torch.zeros(3)
    _run(library, "tree_sum", x, y, 3, 1000, bug)
    return torch.allclose(y, x.sum(1), atol=1e-4)


def _two_sums_are_right(library: Emulated, bug: bool) -> bool:
    x, y = _random(2, 256), torch.zeros(2, 256)
    _run(library, "two_sums", x, y, bug)
    return torch.allclose(y, x.sum(1, keepdim=True).expand(2, 256), atol=1e-4)


def _next_lane_is_right(library: Emulated, bug: bool) -> bool:
    x, y = _random(32), torch.zeros(32)
    _run(library, "next_lane", x, y, bug)
    return torch.equal(y, x.roll(-1))


# No barrier between the levels of a tree; none before shared memory is used again; no __syncwarp.
@pytest.mark.parametrize("is_right", [_tree_sum_is_right, _two_sums_are_right, _next_lane_is_right])
def test_missing_synchronisation_shows_in_some_order(
    cases: Emulated, is_right: Callable[[Emulated, bool], bool]
) -> None:
    right: dict[bool, list[bool]] = {False: [], True: []}
    for order in ORDERS:
        cases.order(order, seed=1)
        for bug, seen in right.items():
            seen.append(is_right(cases, bug))
    assert all(right[False])
    assert not all(right[True])


def test_barrier_in_a_divergent_branch(emulated: Emulated) -> None:
    x, y = _random(96), torch.zeros(96)
    _run(emulated, "reverse", x, y, 96, False)
    assert torch.equal(y, x.flip(0))
    assert emulated.call("reverse", x, y, 96, True) == 719
    error = emulated.error()
    assert "reverse<true>" in error and "block (0,0,0), thread (" in error
    assert "divergent barrier" in error and error.count("cases.cu:") == 2
    _run(emulated, "reverse", x, y, 96, False)  # as good as new


def test_one_element_too_many_meets_the_guard_page(emulated: Emulated) -> None:
    x, y = guarded(_random(1000)), guarded(torch.zeros(1000))
    _run(emulated, "twice", x, y, 1000, False)
    assert torch.equal(y, 2 * x)
    assert emulated.call("twice", x, y, 1000, True) == 700
    error = emulated.error()  # element 1000 belongs to the sixth round of blocks of 64: block 0, thread 40
    assert f"block (0,0,0), thread (40,0,0): illegal access of address {x.data_ptr() + 4000:#x}" in error


def test_guard_page_before_a_tensor(cases: Emulated) -> None:
    y = guarded(torch.zeros(5), before=True)
    assert cases.call("faults", y, 4) == 700
    assert "global memory that is not there" in cases.error()


def test_guarded_tensors_keep_values_and_alignment() -> None:
    x = _random(7, 3)
    assert torch.equal(guarded(x), x) and torch.equal(guarded(x, before=True), x)
    end = guarded(x, align=16)
    assert end.data_ptr() % 16 == 0 and (end.data_ptr() + 84) % 4096 == 4096 - 12
    assert (guarded(x).data_ptr() + 84) % 4096 == 0
    assert guarded(torch.zeros(0, 4)).shape == (0, 4)


def test_offset_of_32_bits(cases: Emulated) -> None:
    cases.order(Order.forward)
    n = 2**30
    try:
        y = sparse(4 * n, torch.int8)
    except MemoryError as error:
        pytest.skip(str(error))
    _run(cases, "first_of_rows", y, 4, n, False)
    assert [int(y[row * n : row * n + 100].sum()) for row in range(4)] == [64] * 4
    for bug in (1, 2):  # an offset computed in 32 bits, and one that is cut to them
        assert cases.call("first_of_rows", y, 4, n, bug) == 700
        assert "block (2,0,0)" in cases.error() and "illegal access" in cases.error()


def test_shared_memory_read_before_it_is_written(emulated: Emulated) -> None:
    x, y = _random(256), torch.zeros(256)
    expected = x + torch.cat([x[1:], torch.zeros(1)])
    _run(emulated, "neighbours", x, y, False)
    assert torch.equal(y, expected)
    _run(emulated, "neighbours", x, y, True)
    assert y[:255].equal(expected[:255]) and y[255].isnan()


def test_shuffle_with_a_wrong_mask(emulated: Emulated) -> None:
    x, y = _random(32), torch.zeros(32)
    _run(emulated, "half_warp", x, y, False)
    assert torch.allclose(y[:16], x[:16].sum().expand(16)) and torch.equal(y[16:], x[16:])
    assert emulated.call("half_warp", x, y, True) == 719
    assert "half_warp<true>" in emulated.error() and "__shfl_xor_sync with mask 0xffffffff" in emulated.error()


def test_transpose_in_blocks_of_two_dimensions(emulated: Emulated) -> None:
    x, y = _random(70, 45), torch.zeros(45, 70)
    _run(emulated, "transpose", x, y, 70, 45)
    assert torch.equal(y, x.T)


def test_warp_scan(emulated: Emulated) -> None:
    x, y = torch.arange(64, dtype=torch.int32) * 7 % 11, torch.zeros(64, dtype=torch.int32)
    _run(emulated, "warp_scan", x, y, 64)
    assert torch.equal(y.view(2, 32), x.view(2, 32).cumsum(1).int())


def test_histogram_by_a_persistent_grid(emulated: Emulated) -> None:
    x = torch.randint(0, 16, (3001,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    counts = torch.zeros(16, dtype=torch.int32)
    _run(emulated, "histogram", x, counts, 3001)
    assert torch.equal(counts, torch.bincount(x, minlength=16).int())


def test_last_block_adds_up(emulated: Emulated) -> None:
    x, partial, ticket, y = _random(1000), torch.zeros(16), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    for _ in range(2):  # the ticket is back at zero
        _run(emulated, "last_block", x, partial, ticket, y, 1000)
        assert torch.allclose(y, x.sum(), atol=1e-4)


def test_votes_of_a_warp_and_a_half(emulated: Emulated) -> None:
    x = torch.tensor([lane * 5 % 7 for lane in range(48)], dtype=torch.int32)
    x[32:] = 4
    rows = torch.zeros(48, 12, dtype=torch.int32)
    _run(emulated, "votes", x, rows)
    for thread, row in enumerate(rows.tolist()):
        base, lanes = (0, 32) if thread < 32 else (32, 16)
        warp, lane = x[base : base + lanes].tolist(), thread - base
        bits = [[sum(1 << i for i, v in enumerate(warp) if v % 2), 3 in warp, True], [warp[lane]]]
        assert [row[0] % 2**32, *map(bool, row[1:3])] == bits[0]
        assert row[3] % 2**32 == sum(1 << i for i, v in enumerate(warp) if v == warp[lane])
        assert (row[4] % 2**32, row[5]) == ((2**lanes - 1, 1) if len(set(warp)) == 1 else (0, 0))
        assert row[6:8] == [sum(warp), min(warp) - 5]
        assert row[8] == warp[lane // 8 * 8 + 3]
        assert row[9] == warp[lane + 2 if lane % 8 < 6 else lane]
        assert row[11] == 8 + 100 + 1000


def test_every_thread_of_three_dimensions_runs_once(emulated: Emulated) -> None:
    y = torch.zeros(8, 6, 12, dtype=torch.int32)
    _run(emulated, "everywhere", y)
    assert bool((y == 1).all())


def test_half_precision_atomics_and_shuffles(emulated: Emulated) -> None:
    x = torch.arange(64).half() / 8
    total, y = torch.zeros(2).half(), torch.zeros(32).bfloat16()
    _run(emulated, "halves", x, total, y)
    assert torch.equal(total, x.view(32, 2).sum(0))
    assert torch.equal(y[:31], x[1:32].bfloat16())


def test_thread_that_waits_for_another(emulated: Emulated) -> None:
    y = torch.zeros(1, dtype=torch.int32)
    _run(emulated, "wait_for_last", y)
    assert y.item() == 7


@pytest.mark.parametrize(
    ("which", "code", "words"),
    [
        (0, 700, "beyond the launch's dynamic shared memory"),
        (1, 719, "deadlock"),
        (2, 719, "its own lane is not in that of __shfl_sync with mask 0xfffffffe"),
        (3, 719, "a shuffle of width 24"),
        (5, 700, "the end of the thread's stack"),
    ],
)
def test_faults_become_errors(emulated: Emulated, which: int, code: int, words: str) -> None:
    assert emulated.call("faults", torch.zeros(4), which) == code
    assert words in emulated.error() and "block (64,1,1), 1024 bytes" in emulated.error()


@pytest.mark.parametrize(
    ("launch", "code"),
    [
        ((0, 1, 32, 1, 0), 9),
        ((1, 65536, 32, 1, 0), 9),
        ((2**31, 1, 32, 1, 0), 9),
        ((1, 1, 1025, 1, 0), 9),
        ((1, 1, 1, 65, 0), 9),
        ((1, 1, 512, 4, 0), 9),
        ((1, 1, 0, 1, 0), 9),
        ((1, 1, 32, 1, 227 * 1024 + 1), 1),
    ],
)
def test_launches_that_no_gpu_takes(cases: Emulated, launch: tuple[int, ...], code: int) -> None:
    assert cases.call("limits", *launch) == code
    assert "wait_for_last" in cases.error()


def test_launches_from_several_threads_at_once(cases: Emulated) -> None:
    cases.order(Order.forward)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(5):
            if not _tree_sum_is_right(cases, False):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_same_orders_by_the_portable_switch(tmp_path: Path, cases: Emulated) -> None:
    portable = _compiled(tmp_path, "-DMEGAPT_EMULATOR_UCONTEXT", "-O0")
    for order in ORDERS:
        results = []
        for library in (cases, portable):
            library.order(order, seed=9)
            x, y = _random(2, 256), torch.zeros(2, 256)
            _run(library, "two_sums", x, y, True)  # its numbers depend on the order of the threads
            results.append(y)
            assert library.call("faults", y, 5) == 700
        assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """The cases with the race detector and the language's checks."""
    return _compiled(tmp_path_factory.mktemp("watched"), races=True)


@pytest.mark.parametrize(
    ("name", "shapes", "sizes", "words"),
    [
        ("tree_sum", ((3, 1000), (3,)), (3, 1000), "thread"),
        ("two_sums", ((512,), (512,)), (), "thread"),
        ("next_lane", ((32,), (32,)), (), "thread"),
        ("count", ((1,),), (), "thread"),
        ("neighbour_blocks", ((4,), (4,)), (), "a thread of block"),
    ],
)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_races_show_in_every_order(
    watched: Emulated, order: Order, name: str, shapes: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], words: str
) -> None:
    watched.order(order, seed=1)
    tensors = [torch.zeros(*shape) for shape in shapes]
    _run(watched, name, *tensors, *sizes, False)
    assert watched.call(name, *tensors, *sizes, True) == 719
    error = watched.error()
    assert "race: it" in error and words in error and error.count("cases.cu:") >= 2


@pytest.mark.parametrize(
    ("which", "code", "words"),
    [
        (6, 716, "which is no multiple of 16 ("),
        (7, 719, "signed overflow of a multiplication ("),
        (8, 700, "index 64 is outside of the array ("),
        (9, 719, "its launcher: a shift by too much, or of a negative number ("),
    ],
)
def test_what_the_language_leaves_undefined(watched: Emulated, which: int, code: int, words: str) -> None:
    watched.order(Order.forward)
    assert watched.call("faults", torch.zeros(8), which) == code
    assert words in watched.error() and "cases.cu:" in watched.error()


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_no_race_where_threads_synchronise(watched: Emulated, order: Order) -> None:
    watched.order(order, seed=2)
    x, y, i = _random(70 * 45), torch.zeros(70 * 45), torch.zeros(1000, dtype=torch.int32)
    _run(watched, "transpose", x, y, 70, 45)
    _run(watched, "last_block", x, y[:16], i[:1], y[20:21], 1000)
    _run(watched, "histogram", i, i[:16].clone(), 1000)
    _run(watched, "votes", i, torch.zeros_like(i))
    _run(watched, "wait_for_last", i)
    _run(watched, "reverse", x, y, 96, False)
    _run(watched, "halves", x.half(), torch.zeros(2).half(), y.bfloat16())


def test_bugs_planted_in_a_copy_of_the_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="common.cuh holds 2 times"):
        planted(tmp_path, "glu", ("common.cuh", "    __syncthreads();\n", ""))
