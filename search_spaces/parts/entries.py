"""Methods of a study file with their options: presets, post rules on top of anything.

    presets: [ties, {tsv_m: {rank_share: search}}, {dare: {rescale: [inverse_density, match_l1], post: [svc]}}]
    post: [{svc: {alpha: [0.05, 0.1]}}]

An option of a preset is, in this order: one of its rules' (operator, post rule, measure; a measure that both selects
and weighs gets it for both); ``allocate``, ``post``; or a number, switch or word of a stage that it reads (`STAGES`):
``winsorise``, ``gamma``, ``temperature``, ``rescale``, ``spread``, ... `option_axes` says how values are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merge_search.errors import RecipeError, SpaceError, nearest
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Recipe, Scalar
from merge_search.recipe_options import Home, Place, options_of, value_at
from merge_search.rules import MEASURES, POSTS, STAGES, operator_problems
from merge_search.rules.operators import pairs_refusal
from merge_search.space import Categorical, SpaceContext
from search_spaces.parts.methods import Method, of_template, scaling_of
from search_spaces.parts.option_axes import SEARCH, OptionAxis, option_value, write

__all__ = [
    "PostEntry",
    "PresetEntry",
    "preset_methods",
    "with_options",
    "with_post_rules",
]

PresetEntry = str | dict[str, Any]
"""A preset by its name, or with options: ``{tsv_m: {rank_share: 0.3}}``."""
PostEntry = str | dict[str, Any]
"""A post rule by its name, or with options: ``{svc: {alpha: 0.2}}``."""

Data = dict[str, Any]


# ------------------------------------------------------------------------------------------------------- presets


def preset_problems(names: Iterable[str], context: SpaceContext, *, at: str) -> list[str]:
    """Why presets cannot be choices: they are unknown, do not fit the number of experts, or have no coefficients."""
    problems = []
    n = len(context.experts)
    for name in names:
        if name not in PRESETS:
            usable = [p.name for p in PRESETS.values() if p.is_linear and p.fit is None]
            problems.append(f"{at}: no preset is called {name!r}{nearest(name, usable)}")
            continue
        p = PRESETS[name]
        low, high = p.experts
        if p.fit is not None:
            problems.append(f"{at}: {name!r} fits its own coefficients; list it under search.baselines")
        elif not p.is_linear:
            problems.append(f"{at}: {name!r} has no coefficients to search; list it under search.baselines")
        elif n < low or (high is not None and n > high):
            wanted = f"at least {low}" if high is None else f"{low} to {high}"
            problems.append(f"{at}: {name!r} needs {wanted} experts, and the study has {n}; leave it out")
        elif p.needs_factors:
            problems += [
                pairs_refusal(f"{at}: {name!r}", expert, why) for expert, why in context.without_factors.items()
            ]
    return problems


def preset_methods(
    entries: Sequence[PresetEntry],
    context: SpaceContext,
    *,
    at: str,
    post: Sequence[PostEntry] = (),
    search_density: bool = True,
    one: bool = False,
) -> list[Method]:
    """The presets of a study file, each once, with the space's post rules on top.

    Args:
        entries: As written.
        context: The study's models.
        at: Their place in the study file.
        post: The post rules of the whole space, as written.
        search_density: Whether densities are searched; otherwise they are the published ones.
        one: Whether the entries are one preset, which has no index in its place.

    Raises:
        SpaceError: With all problems: presets, options and values that are unknown or wrong, or stand twice.
    """
    methods: dict[str, tuple[PresetEntry, Method]] = {}
    problems: list[str] = []
    for i, entry in enumerate(entries):
        place = at if one else f"{at}.{i}"
        pairs: list[tuple[str, Any]] = [(entry, {})] if isinstance(entry, str) else list(entry.items())
        if len(pairs) != 1 or not isinstance(pairs[0][1], Mapping):
            problems.append(f"{place}: write NAME or {{NAME: {{option: value}}}}, got {entry!r}")
            continue
        name, options = pairs[0]
        if wrong := preset_problems([name], context, at=at):
            problems += wrong
            continue
        made, wrong = _preset(name, options, context, search_density)
        problems += [f"{place}: {text}" for text in wrong]
        if made is None:
            continue
        before, _ = methods.setdefault(made.name, (entry, made))
        if _written(before) != _written(entry):
            problems.append(
                f"{place}: {made.name!r} stands twice with different values to search; put them into one entry"
            )
    try:
        found = with_post_rules([m for _, m in methods.values()], post, context)
    except SpaceError as error:
        problems += error.problems
    if problems:
        raise SpaceError(problems)
    return found


def _written(entry: PresetEntry) -> tuple[str, Any]:
    return (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))


def _preset(
    name: str, options: Mapping[str, Any], context: SpaceContext, search_density: bool
) -> tuple[Method | None, list[str]]:
    """A preset with options, and what is wrong with them."""
    data = _data(preset(name, context.models, seed=context.seed, dtype=context.dtype))
    given = _configure(data, options, context, name)
    problems = given.problems + [_unknown(name, key, given.known) for key in given.unread]
    if problems:
        return None, problems
    fixed = [f"{k}={given.fixed[k]}" for k in options if k in given.fixed]
    label = f"{name}({', '.join(fixed)})" if fixed else name
    try:
        recipe = Recipe.from_dict(data)
    except RecipeError as error:
        return None, list(error.problems)
    named = tuple(replace(a, name=f"{label}.{a.name}") for a in given.axes)
    return of_template(label, recipe, named, search_density=search_density), []


@dataclass
class Given:
    """Options of one method.

    Attributes:
        fixed: Those with one value, as they are shown.
        axes: Those that are searched.
        problems: What is wrong with values.
        unread: Those that the method does not read.
        known: Those that it reads.
    """

    fixed: dict[str, object] = field(default_factory=dict)
    axes: list[OptionAxis] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    known: Mapping[str, object] = field(default_factory=dict)

    def take(self, key: str, written: object, found: tuple[Scalar | OptionAxis | None, list[str]]) -> None:
        """Add an option that was read."""
        value, problems = found
        self.problems += problems
        if isinstance(value, OptionAxis):
            self.axes.append(value)
        elif value is not None:
            self.fixed[key] = written


def _configure(data: Data, options: Mapping[str, Any], context: SpaceContext, name: str) -> Given:
    """Put a method's options into the data of its recipe.

    Args:
        data: The recipe, which is changed.
        options: As written.
        context: The study's models.
        name: What messages call the method.
    """
    given = Given()
    if "allocate" in options:
        given.take("allocate", options["allocate"], _allocate(name, options["allocate"], data))
    places = options_of(Recipe.model_validate(data), name)
    if given.axes:  # other measures have other options
        places = {k: v for k, v in places.items() if v[0].home[:2] != ("allocate", "options")}
    if "post" in options:
        rules, axes, problems = _post_rules(options["post"], context, start=len(data["post"]))
        data["post"] += [rule for rule, _ in rules]
        given.fixed["post"] = "+".join(label for _, label in rules)
        given.axes += axes
        given.problems += problems
    if scaling_of(Recipe.model_validate(data)) == "fixed":
        places.setdefault("scale", [Place(replace(STAGES["scale"], name=name), "scale", ("scale",))])
    given.known = places
    for key, written in options.items():
        if key in ("post", "allocate"):
            continue
        if key not in places:
            given.unread.append(key)
            continue
        found = _option(places[key], written, key, data)
        given.take(key, written, found)
        if found[0] is not None and not isinstance(found[0], OptionAxis):
            for place in places[key]:
                write(data, place.home, found[0], place.absent)
    return given


def with_options(methods: Sequence[Method], options: Mapping[str, Any], context: SpaceContext) -> list[Method]:
    """The methods with options of the whole space, each with those that it reads. Searched ones are shared.

    Raises:
        SpaceError: With all problems: values that are wrong, options that no method reads or that an entry sets, too.
    """
    if not options or not methods:
        return list(methods)
    out, unread, known = [], set(options), set[str]()
    problems: list[str] = []
    for method in methods:
        data = _data(method.template)
        mine = {k: v for k, v in options.items() if k != "allocate" or data["operator"] is None}
        given = _configure(data, mine, context, "")
        unread -= mine.keys() - set(given.unread)
        known |= given.known.keys()
        problems += given.problems
        axes = tuple(replace(a, name=f"options.{a.name}") for a in given.axes)
        searched = {home for a in method.options for home, _ in a.homes}
        problems += [f"{a.name} is searched in an entry, too" for a in axes if searched & {h for h, _ in a.homes}]
        if not given.problems:
            recipe = Recipe.from_dict(data)
            out.append(replace(method, template=recipe, options=(*method.options, *axes), scaling=scaling_of(recipe)))
    problems += [
        f"no method here has an option {k!r}{nearest(str(k), known | {'allocate'})}" for k in options if k in unread
    ]
    if problems:
        raise SpaceError([f"space.options: {text}" for text in dict.fromkeys(problems)])
    return out


def _data(recipe: Recipe) -> Data:
    data = recipe.model_dump()
    data["post"] = list(data["post"])
    return data


def _unknown(name: str, key: str, places: Mapping[str, object]) -> str:
    if key in ("spread", "floor", "coefficient_power"):
        return f"{name!r} has no option {key!r} unless it allocates: add allocate: MEASURE, for example magnitude"
    if key == "scale":
        return f"{name!r} has no option 'scale': its coefficients hold all of the strength"
    known = sorted({*places, "allocate", "post"})
    return f"{name!r} has no option {key!r}{nearest(str(key), known)}"


def _option(
    places: Sequence[Place], written: object, name: str, data: Mapping[str, Any]
) -> tuple[Scalar | OptionAxis | None, list[str]]:
    """A fixed value or a searched option, or None and what is wrong.

    Args:
        places: Where it belongs.
        written: As the study file has it.
        name: The name of its parameter.
        data: The recipe of the method as it is.
    """
    first, *others = places
    value, problems = option_value(first.rule, first.option, written)
    for place in others:
        problems += option_value(place.rule, place.option, written)[1]
    if problems or value is None:
        return None, list(dict.fromkeys(problems))
    if isinstance(value, Scalar):
        return value, []
    homes = tuple((place.home, place.absent) for place in places)
    return OptionAxis(name, value, homes, value_at(data, first.home, first.absent)), []


def _allocate(name: str, written: object, data: Data) -> tuple[Scalar | OptionAxis | None, list[str]]:
    """Allocation by a measure, switched on in `data`. A list of measures is searched."""
    measures = tuple(n for n, m in MEASURES.items() if not (m.is_constant or m.after_mask))
    words = measures if isinstance(written, list) else ("none", *measures)
    name = name or "allocate"
    rule = replace(STAGES["allocate"], name=name, choices={"allocate": words})
    if data["operator"] is not None:
        return None, [f"option 'allocate' of {name!r}: an operator has no densities to allocate"]
    if isinstance(written, Mapping) or written == SEARCH:
        return None, [f"option 'allocate' of {name!r}: name a measure, or list measures to choose from"]
    value, problems = option_value(rule, "allocate", written)
    if value is None:
        return None, problems
    if isinstance(value, Categorical):
        data["allocate"] |= {"kind": "importance", "measure": value.choices[0], "options": {}}
        return OptionAxis("allocate", value, ((("allocate", "measure"), None),), value.choices[0]), []
    assert isinstance(value, Scalar)
    data["allocate"] |= {"kind": "importance", "measure": value, "options": {}}
    if value == "none":
        data["allocate"] = {"kind": "constant"}
    return value, []


# ---------------------------------------------------------------------------------------------------- post rules


def with_post_rules(methods: Sequence[Method], entries: Sequence[PostEntry], context: SpaceContext) -> list[Method]:
    """The methods with the space's post rules applied last. Searched options are shared by all of them.

    Raises:
        SpaceError: With all problems.
    """
    _, _, problems = _post_rules(list(entries), context, start=0)
    if problems:
        raise SpaceError([f"space.{text}" for text in problems])
    if not entries:
        return list(methods)
    out = []
    for method in methods:
        rules, axes, _ = _post_rules(list(entries), context, start=len(method.template.post))
        data = _data(method.template)
        data["post"] += [rule for rule, _ in rules]
        recipe = Recipe.from_dict(data)
        options = (*method.options, *axes)
        out.append(replace(method, template=recipe, options=options, scaling=scaling_of(recipe)))
    return out


def _post_rules(
    entries: object, context: SpaceContext, *, start: int
) -> tuple[list[tuple[Data, str]], list[OptionAxis], list[str]]:
    """(rule of a recipe, label) of every post rule that is right, their searched options, and what is wrong.

    Args:
        entries: As written: names, or ``{NAME: {option: value}}``.
        context: The study's models.
        start: The number of post rules before them.
    """
    if not isinstance(entries, list):
        return [], [], [f"post: write a list of post rules, for example [svc], got {entries!r}"]
    rules: list[tuple[Data, str]] = []
    axes: list[OptionAxis] = []
    problems: list[str] = []
    for i, entry in enumerate(entries):
        pairs: list[tuple[Any, Any]] = [(entry, {})] if isinstance(entry, str) else list(dict(entry).items())
        if len(pairs) != 1 or not isinstance(pairs[0][1], Mapping):
            problems.append(f"post.{i}: write NAME or {{NAME: {{option: value}}}}, got {entry!r}")
            continue
        (name, options), options_here, texts = pairs[0], {}, []
        if wrong := operator_problems(str(name), {}, len(context.experts), table=POSTS):
            problems += [f"post.{i}: {text.removeprefix('post: ')}" for text in wrong]
            continue
        row, last = POSTS[name], f"{name}.{i}" if any(d["name"] == name for d, _ in rules) else name
        for option, written in options.items():
            home: Home = ("post", start + i, "options", option)
            if option not in row.options:
                problems.append(f"post.{i}: {name!r} has no option {option!r}{nearest(str(option), row.options)}")
                continue
            place = Place(row, option, home)
            value, wrong = _option([place], written, f"post.{last}.{option}", {"post": {start + i: {"options": {}}}})
            problems += [f"post.{i}: {text}" for text in wrong]
            if isinstance(value, OptionAxis):
                axes.append(value)
            elif value is not None:
                texts.append(f"{option}={written}")
                if value != row.options[option]:
                    options_here[option] = value
        rules.append(({"name": name, "options": options_here}, f"{name}({', '.join(texts)})" if texts else str(name)))
    return rules, axes, problems
