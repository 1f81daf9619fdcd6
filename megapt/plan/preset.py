"""A plan's choice as a config file, with the table that chose it in its comment."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megapt.config import Config, Loaded, load
from megapt.files import write_whole
from megapt.plan.search import Option, Plan
from megapt.plan.table import WIDTH, details, printed, ranking, summary, title, whole_width

_MARK = "# Chosen by `"
# Written although they are the defaults: what a reader looks for in a layout.
_SHOWN = ("parallel.tensor", "parallel.pipeline", "zero.stage", "batch.micro")


def first_comment(text: str) -> list[str]:
    """The lines of a file's own comment at its top, without what a plan has written there before."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or line.startswith(_MARK):
            break
        lines.append(line)
    while lines and lines[-1].strip() == "#":
        lines.pop()
    return lines


def text(
    loaded: Loaded,
    source: str,
    plan: Plan,
    option: Option,
    rows: Sequence[Option],
    command: str,
    notes: Sequence[str] = (),
) -> str:
    """The config in the option's layout: what its file stated, and what the layout changes. source: the file's text."""
    ranked = ranking(plan, rows)
    first, second = printed(ranked, max(WIDTH, whole_width(ranked))), printed(details(plan, rows))
    tables = [*first.splitlines(), "", *second.splitlines()]
    chosen = next((number for number, row in enumerate(rows, 1) if row is option), 0)
    which = f"Number {chosen} is this file's." if chosen else f"This file's: {option.layout}."
    after = [line for said in (which, *summary(plan).splitlines()) for line in textwrap.wrap(said, WIDTH)]
    comment = [title(plan), "", *tables, "", *after, *notes]
    shown = [f"{_MARK}{command}`:", *(f"# {line}".rstrip() for line in comment)]
    own = first_comment(source)
    head = [*own, "#"] if own else []
    return "\n".join([*head, *shown, body(loaded, option.config)])


def body(loaded: Loaded, config: Config) -> str:
    """YAML of what the config's file stated and of what differs from the defaults."""
    tree = _kept(config.model_dump(), _defaults(config), set(loaded.origins), "")
    parts = [
        yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, width=118, allow_unicode=True)
        for key, value in tree.items()
    ]
    # A blank line around sections, none between single values.
    return "".join(f"\n{part}" if part.count("\n") > 1 else part for part in parts)


def write(
    path: Path,
    loaded: Loaded,
    source: str,
    plan: Plan,
    option: Option,
    rows: Sequence[Option],
    command: str,
    notes: Sequence[str] = (),
) -> None:
    """Put the config at `path`, whole, once it is known to load as what it should be."""
    made = text(loaded, source, plan, option, rows, command, notes)
    write_whole(path, made.encode())
    again = load(path).config
    assert again == option.config, f"{path} does not say what was meant"


def _defaults(config: Config) -> dict[str, Any]:
    """The tree with every section's defaults; what has none is missing."""
    found: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            found[name] = value.model_dump() if hasattr(value, "model_dump") else value
    for name in ("model", "data", "batch", "train"):
        section = type(getattr(config, name))
        found[name] = {
            key: field.get_default(call_default_factory=True)
            for key, field in section.model_fields.items()
            if not field.is_required()
        }
    return found


def _kept(value: dict[str, Any], default: Any, given: set[str], prefix: str) -> dict[str, Any]:
    """Of a tree, what was given, differs from the default or is always shown."""
    kept: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        known = isinstance(default, dict) and key in default
        if isinstance(inner, dict) and known and isinstance(default[key], dict):
            below = _kept(inner, default[key], given, f"{name}.")
            if below:
                kept[key] = below
        elif not known or inner != default[key] or name in _SHOWN or (name in given and inner is not None):
            kept[key] = inner
    return kept


class _Dumper(yaml.SafeDumper):
    pass


def _number(dumper: yaml.SafeDumper, value: int) -> yaml.Node:
    """1000000000000 as 1e12, which the config reads as the same whole number."""
    for unit in (12, 9):
        if value >= 10**unit and value % 10**unit == 0:
            return dumper.represent_scalar("tag:yaml.org,2002:float", f"{value // 10**unit}e{unit}")
    return dumper.represent_scalar("tag:yaml.org,2002:int", str(value))


# What `config.load` reads as a number, so that it is written without a tag.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^\d+e\d+$"), list("0123456789"))
_Dumper.add_representer(int, _number)
_Dumper.add_representer(list, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))
