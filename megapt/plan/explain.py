"""Why a layout is not the best one: the rule that it breaks, the memory that it lacks, or the seconds that it loses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megapt.config import from_tree
from megapt.errors import UserError
from megapt.plan.advice import least_memory
from megapt.plan.candidates import DEFAULT_CHUNKS, Layout, Wanted, divisors
from megapt.plan.search import Option, Plan, evaluate, room, search
from megapt.plan.table import gib, memory_items
from megapt.rules import check_world


@dataclass(frozen=True)
class Explanation:
    """verdict: one sentence. rows: per item (what, of the layout, of the best, difference), in seconds or in GiB."""

    verdict: str
    option: Option | None = None
    seconds: tuple[tuple[str, float, float], ...] = ()
    bytes: tuple[tuple[str, float, float], ...] = ()

    def lines(self) -> list[str]:
        made = [self.verdict]
        for unit, rows, scale in (("s", self.seconds, 1.0), ("GiB", self.bytes, 2.0**30)):
            if rows:
                made.append(f"  {unit + ' of a step' if unit == 's' else unit + ' of the fullest rank':<26}"
                            f"{'this one':>11}{'best':>11}{'difference':>12}")
                made += [
                    f"  {name:<26}{here / scale:>11.3f}{best / scale:>11.3f}{(here - best) / scale:>+12.3f}"
                    for name, here, best in rows
                ]
        return made


def explain(plan: Plan, wanted: Wanted) -> Explanation:
    """What the best layout with these values loses against the best of the plan, and where."""
    broken = _broken(plan, wanted)
    if broken is not None:
        return broken
    try:
        found = search(
            plan.config,
            plan.world,
            plan.hardware,
            margin=plan.margin,
            backend=plan.backend,
            only=wanted,
            best_alone=True,
        )
    except UserError as error:
        return Explanation(f"{wanted} is not legal: {error}")
    if not found.ranked:
        least = least_memory(found)
        if least is None:
            return Explanation(f"{wanted} is not possible: no layout keeps that little")
        return _too_large(plan, wanted, least)
    return compare(plan, found.best, f"{wanted}")


def _broken(plan: Plan, wanted: Wanted) -> Explanation | None:
    """The rule that these values break on the best layout, as the configuration's own check says it.

    None where nothing is broken, and where it is one of the best layout's other values that does not go with them.
    """
    config, given = plan.config, wanted.given
    layout = wanted.onto(plan.best.layout if plan.ranked else Layout())
    # Only what was given may be at fault: the best layout's other axes give way to it.
    if "tp" not in given and plan.world % (layout.tp * layout.pp):
        layout = replace(layout, tp=1)
    if "pp" not in given:
        layout = replace(layout, pp=_pipeline(plan, layout, given))
    if "dp" not in given:
        layout = replace(layout, dp=max(1, plan.world // (layout.tp * layout.pp)))
    if "micro" not in given:
        layout = replace(layout, micro=1)
    if "zero" not in given and layout.pp > 1 and layout.zero[-1] in "23":
        layout = replace(layout, zero="native-1")
    if "schedule" not in given:
        layout = replace(layout, schedule="1f1b", chunks=given.get("chunks", 1))
        if layout.chunks > 1:
            layout = replace(layout, schedule="interleaved")
    try:
        check_world(from_tree(layout.on(config).model_dump()).config, plan.world)
    except UserError as error:
        return Explanation(f"{wanted} is not legal: {error}")
    return None


def _pipeline(plan: Plan, layout: Layout, given: dict[str, Any]) -> int:
    """The best layout's pipeline size, or one that goes with the values given."""
    ranks = plan.world // layout.tp
    pp = layout.pp if plan.world % (layout.tp * layout.pp) == 0 else 1
    if pp == 1 and (given.get("chunks", 1) > 1 or given.get("schedule") in DEFAULT_CHUNKS):
        most = plan.config.model.layers // given.get("chunks", 2)
        return min((size for size in divisors(ranks) if 1 < size <= most), default=1)
    return pp


def compare(plan: Plan, option: Option, name: str) -> Explanation:
    """An option beside the best, item by item."""
    best = plan.best
    seconds = _rows(option.time.items, best.time.items, 0.0005 * best.seconds)
    held = _rows(
        {key: float(value) for key, value in memory_items(option.worst).items()},
        {key: float(value) for key, value in memory_items(best.worst).items()},
        0.0,
    )
    more = option.seconds - best.seconds
    seconds += (("step", option.seconds, best.seconds),)
    held += (("all", float(option.bytes), float(best.bytes)),)
    if option.layout == best.layout or more <= 0:
        verdict = f"{name}: {option.layout} is the best layout; {_figures(option)}"
        return Explanation(verdict, option, seconds, held)
    verdict = (
        f"{name}: the best of these is {option.layout}; {_figures(option)}. It loses {more:.3g} s of a step, "
        f"{more / best.seconds:.1%}, against {best.layout}"
    )
    reasons = sorted(((here - there, item) for item, here, there in seconds[:-1] if here > there), reverse=True)
    gains = sorted(((there - here, item) for item, here, there in seconds[:-1] if here < there), reverse=True)
    if reasons:
        verdict += ": " + ", ".join(f"{item} +{lost:.3g} s" for lost, item in reasons[:3])
    if gains:
        verdict += "; it gains " + ", ".join(f"{item} {won:.3g} s" for won, item in gains[:2])
    return Explanation(verdict, option, seconds, held)


def _figures(option: Option) -> str:
    return f"{option.time.tokens_per_second:,.0f} tokens/s, MFU {option.time.mfu:.1%}, {gib(option.bytes)} GiB"


def _rows(
    here: dict[str, float], best: dict[str, float], least: float
) -> tuple[tuple[str, float, float], ...]:
    names = dict.fromkeys((*here, *best))
    rows = ((name, here.get(name, 0.0), best.get(name, 0.0)) for name in names)
    return tuple(row for row in rows if max(row[1], row[2]) > least)


def _too_large(plan: Plan, wanted: Wanted, option: Option) -> Explanation:
    limit = room(plan.hardware, plan.margin)
    items = memory_items(option.worst)
    largest = sorted(((size, name) for name, size in items.items()), reverse=True)
    verdict = (
        f"{wanted} does not fit: what needs least of these, {option.layout}, needs {gib(option.bytes)} GiB on its "
        f"fullest rank, {gib(option.bytes - limit)} more than the {gib(limit)} there are to use: "
        + ", ".join(f"{name} {gib(size)}" for size, name in largest if size)
    )
    if not plan.ranked:
        return Explanation(verdict, option)
    best = memory_items(plan.best.worst)
    held = _rows({k: float(v) for k, v in items.items()}, {k: float(v) for k, v in best.items()}, 0.0)
    return Explanation(verdict, option, (), (*held, ("all", float(option.bytes), float(plan.best.bytes))))


def difference(before: Plan, after: Plan, changes: list[str]) -> list[str]:
    """What other hardware changes: the best layout of each, item by item."""
    changed = ", ".join(changes)
    if not after.ranked:
        return [f"with {changed} no layout fits"]
    old, new = before.best, after.best
    gain = new.time.tokens_per_second / old.time.tokens_per_second - 1
    same_layout = new.layout == old.layout
    choice = "the best layout stays" if same_layout else f"the best layout is {new.layout} instead of {old.layout}"
    rate = f"{new.time.tokens_per_second:,.0f}, MFU {new.time.mfu:.1%}"
    lines = [f"with {changed}: {gain:+.1%} tokens/s ({rate}); {choice}"]
    if not same_layout:
        try:
            same = evaluate(after.config, old.layout, after.hardware)
        except UserError:
            return lines
        limit = room(after.hardware, after.margin)
        if same.bytes > limit:
            lines.append(f"the old layout does not fit there: it needs {gib(same.bytes)} of {gib(limit)} GiB")
        else:
            lines.append(f"the old layout would be at {same.time.tokens_per_second:,.0f} tokens/s there")
    rows = _rows(new.time.items, old.time.items, 0.002 * old.seconds)
    lines += [
        f"  {name:<26}{there:>9.3f} s ->{here:>9.3f} s"
        for name, here, there in rows
        if abs(here - there) > 0.001 * old.seconds
    ]
    return lines

