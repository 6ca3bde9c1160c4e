"""Options of rules as lines for people: type, default, bounds or choices, source, meaning."""

from __future__ import annotations

from typing import NamedTuple

from merge_search.rules.stages import STAGES, Selection, Splicing, select_fields
from merge_search.rules.table import Rule, Scalar

__all__ = ["OptionLine", "option_line", "rule_options"]


class OptionLine(NamedTuple):
    """One option, in words."""

    option: str
    type: str
    default: str
    allowed: str
    search: str
    source: str
    what: str


def option_line(rule: Rule, option: str, default: Scalar | None = None) -> OptionLine:
    """The line of an option.

    Args:
        rule: Its row.
        option: Its name.
        default: The value that a preset gives to it; None: the row's.
    """
    info = rule.about.get(option)
    usual = rule.options[option] if default is None else default
    allowed = rule.allowed(option)
    search = ""
    if isinstance(rule.options[option], bool):
        kind, values = "switch", "false, true"
    elif isinstance(rule.options[option], str):
        kind, values = "text", ", ".join(map(str, allowed)) or "any"
    else:
        kind = "whole number" if isinstance(rule.options[option], int) else "number"
        values = " or ".join(f"{n:g}" for n in allowed if not isinstance(n, str))
        if info is not None and info.bounds is not None:
            values = _range(info.bounds)
            search = _range(info.usual or info.bounds) + (", log" if info.log else "")
    return OptionLine(
        option, kind, "none" if usual is None else _shown(usual), values or "any", search,
        info.source if info is not None else "", info.what if info is not None else "",
    )  # fmt: skip


def rule_options(rule: Rule) -> list[OptionLine]:
    """The lines of a rule's options. A selection and a splice also have those fields of their stage that they read."""
    lines = [option_line(rule, option) for option in rule.options]
    if isinstance(rule, Selection):
        fields = select_fields(rule)
        lines += [option_line(fields, k, rule.usual.get(k)) for k in rule.reads]
    elif isinstance(rule, Splicing):
        lines += [option_line(STAGES["splice"], k) for k in rule.reads]
    return lines


def _range(bounds: tuple[float, float]) -> str:
    return f"[{bounds[0]:g}, {bounds[1]:g}]"


def _shown(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"
