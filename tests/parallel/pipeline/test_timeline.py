"""A timeline's figures, and each form it is written in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megapt.errors import UserError
from megapt.parallel.pipeline import timeline as timelines
from megapt.parallel.pipeline.actions import Action, Kind
from megapt.parallel.pipeline.schedules import schedule
from megapt.parallel.pipeline.simulate import Costs, simulate
from megapt.parallel.pipeline.timeline import Span, Timeline, chrome_trace, draw, text


def timeline(*rows: str) -> Timeline:
    """From rows of `F0.0@0-1.5` words."""
    ranks = []
    for row in rows:
        words = [word.split("@") for word in row.split()]
        ranks.append([Span(Action.parse(name), *map(float, times.split("-"))) for name, times in words])
    return Timeline(ranks)


TWO = timeline("F0.0@0-1 B0.0@4-6", "F0.0@1-2 B0.0@2-4")


def test_figures() -> None:
    assert TWO.step == 6 and TWO.busy == [3, 3] and TWO.bubble == 1 and TWO.rank_bubbles == [1, 1]
    assert TWO.span_bubble == 1  # rank 0 begins first and ends last
    uneven = timeline("F0.0@0-4", "F0.0@5-6")
    assert uneven.bubble == pytest.approx(12 / 5 - 1) and uneven.rank_bubbles == [0.5, 5]
    assert uneven.span_bubble == pytest.approx(8 / 5 - 1)
    assert TWO.chunks == 1 and timeline("F0.0@0-1 F0.1@1-2").chunks == 2


def test_no_time_has_no_bubble() -> None:
    for empty in (Timeline([]), Timeline([[], []]), timeline("F0.0@0-0")):
        assert empty.step == empty.bubble == empty.span_bubble == 0
        assert text(empty, 80) == ""


def test_json_keeps_everything() -> None:
    made = simulate(schedule("zb-v", 3, 2, 5), Costs.even(3, 2, 0.1, 0.2, 0.3)).timeline
    assert Timeline.from_json(made.to_json()) == made
    first = json.loads(TWO.to_json())["ranks"][0][1]
    assert first == {"action": "B0.0", "start": 4.0, "end": 6.0}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("[]", "a timeline is JSON of the form"),
        ("{", "a timeline is JSON of the form"),
        ('{"ranks": [[{"action": "F0.0", "start": 0}]]}', "'end'"),
        ('{"ranks": [[{"action": "F0.0", "start": "x", "end": 1}]]}', "a timeline is JSON of the form"),
        ('{"ranks": [[{"action": "F0", "start": 0, "end": 1}]]}', "as in F3.0; got 'F0'"),
        ('{"ranks": [[{"action": "sF0.0", "start": 0, "end": 1}]]}', "holds compute actions, got sF0.0 on rank 0"),
        ('{"ranks": [[], [{"action": "F0.0", "start": 2, "end": 1}]]}', "F0.0 of rank 1 from 2.0 to 1.0 s"),
        ('{"ranks": [[{"action": "F0.0", "start": -1, "end": 1}]]}', "from -1.0 to 1.0 s where 0.0 s have passed"),
        (
            '{"ranks": [[{"action": "F0.0", "start": 0, "end": 2}, {"action": "F1.0", "start": 1, "end": 3}]]}',
            "F1.0 of rank 0 from 1.0 to 3.0 s where 2.0 s have passed",
        ),
    ],
)
def test_what_is_no_timeline_is_refused(wrong: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Timeline.from_json(wrong)
    assert message in str(caught.value)


def test_text_says_as_much_as_fits() -> None:
    full = text(TWO, 30)
    assert full == "rank 0 F0-.........B0----\nrank 1 ...F0-B0----......"
    assert text(TWO, 25) == full
    assert text(TWO, 24) == "rank 0 F...B-\nrank 1 .FB-.."
    assert text(TWO, 12) is None
    assert text(timeline("F0.0@0-1 F0.1@1-2"), 80) == "rank 0 F0.0-F0.1-"


def test_chrome_trace(tmp_path: Path) -> None:
    chrome_trace(TWO, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["rank 0", "rank 1"]
    (last,) = [event for event in events if event["ph"] == "X" and event["tid"] == 1 and event["name"] == "B0.0"]
    assert last["cat"] == "backward" and last["ts"] == 2e6 and last["dur"] == 2e6
    assert last["args"] == {"micro_batch": 0, "chunk": 0}


def test_picture_has_a_row_per_rank_and_a_colour_per_kind_and_chunk(tmp_path: Path) -> None:
    made = simulate(schedule("zb-v", 3, 2, 3), Costs.even(3, 2)).timeline
    draw({"zb-v": made, "the same": made}, tmp_path / "two.png")
    draw({"zb-v": made}, tmp_path / "one.png")
    assert len(list(tmp_path.iterdir())) == 2
    image = imread(tmp_path / "one.png")[..., :3]
    assert imread(tmp_path / "two.png").shape[0] > 1.5 * image.shape[0]
    for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT):
        for chunk in range(2):
            colour = timelines._colour(kind, chunk, 2)[:3]
            seconds = sum(
                end - start for row in made.ranks for a, start, end in row if (a.kind, a.chunk) == (kind, chunk)
            )
            # The panel's rows are what is not title, axis and legend: more than a third of the picture.
            share = np.isclose(image, colour, atol=1 / 255).all(axis=-1).mean()
            assert share == 0 if not seconds else share > 0.2 * seconds / (3 * made.step)


def test_a_picture_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        draw({"two": TWO}, tmp_path / "two.png")
    assert not list(tmp_path.iterdir())
