"""Real engines of both ZeRO backends in layouts of all kinds load what each other saved, bit for bit."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from megapt import checkpoint
from megapt.checkpoint.diff import diff
from megapt.prove.layout import Layout
from megapt.prove.ranks import Ranks
from tests.checkpoint.resharding import SHAPES, Case, copy_source, folder_of, load_all, train_source

LAYOUTS = {
    "llama": (
        "zero=native-0",
        "tp=2,vocabulary=32,zero=native-1",
        "dp=2,zero=native-2",
        "pp=2,stages=1/3,zero=deepspeed-1",
        "tp=2,dp=2,zero=deepspeed-2",
        "dp=4,zero=deepspeed-3",
        "tp=4,vocabulary=8",
        "tp=2,pp=2",
        "pp=2,dp=2,stages=3/1,zero=native-1",
    ),
    "gpt2": ("pp=2,dp=2,zero=native-1", "tp=2,pp=2,vocabulary=64", "dp=4,zero=deepspeed-3"),
}


def test_what_any_layout_saves_any_other_loads(tmp_path: Path) -> None:
    root = str(tmp_path)
    cases = [(shape, layout) for shape, layouts in LAYOUTS.items() for layout in layouts]
    by_world: dict[int, list[Case]] = {}
    for case in cases:
        by_world.setdefault(Layout.parse(case[1]).world, []).append(case)
    with ExitStack() as stack:
        ranks = {world: stack.enter_context(Ranks(world, timeout=250)) for world in sorted(by_world)}
        ranks[1].run(train_source, root)
        for world, own in by_world.items():
            assert all(count > 10_000 for count in ranks[world].run(copy_source, root, own))
        for world, own in by_world.items():
            assert all(count > 10_000 for count in ranks[world].run(load_all, root, own, cases))
    for shape, layout in cases:
        found = diff(folder_of(root, (shape, "")), folder_of(root, (shape, layout)))
        assert found.same(ignore_meta=True), (layout, found)
        assert found.equal == 3 * len(checkpoint.read_index(folder_of(root, (shape, ""))).tensors)
    assert by_world.keys() == {1, 2, 4} and LAYOUTS.keys() == SHAPES.keys()
