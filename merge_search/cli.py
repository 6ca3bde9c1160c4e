"""The command line. A command imports heavy modules only when it needs them, and reads its file before that."""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from merge_search.errors import InputError, MergeSearchError, first_line, nearest
from merge_search.stop_signals import exit_status, stoppable

if TYPE_CHECKING:
    import optuna

    from merge_search.report.table import Table
    from merge_search.search.plan import Plan
    from merge_search.study_file import StudyFile

__all__ = ["main"]

app = typer.Typer(
    help="Search for the best single model that a base and its fine-tuned experts can make.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console()
VALIDATION = "validation questions (± one standard error), best by these and the search questions first"
err = Console(stderr=True)
KEPT = "all stored results are kept"
LOST = ("sqlalchemy.exc.OperationalError", "sqlalchemy.exc.InterfaceError", "sqlalchemy.exc.DatabaseError")
"""Errors of a database that is gone, locked or damaged. They are named, since importing their classes is slow."""

StudyArgument = Annotated[Path, typer.Argument(help="The study file (YAML).", show_default=False)]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; replaces that of the study file.")]
OutArgument = Annotated[
    Path, typer.Argument(help="Folder to write. It must be empty or not exist.", show_default=False)
]

AdapterOption = Annotated[bool, typer.Option("--adapter", help="Write a LoRA adapter; every expert must be one.")]
RankOption = Annotated[
    int | None, typer.Option(help="With --adapter: the largest rank. The nearest adapter of that rank is written.")
]


@app.command()
def init(
    study: Annotated[Path, typer.Argument(help="The study file to write.")] = Path("study.yaml"),
    base: Annotated[str, typer.Option(metavar="PATH_OR_ID", help="Folder or hub id of the base.")] = "",
    expert: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]PATH_OR_ID", help="A fine-tune of the base; give it repeatedly.")
    ] = None,
    tasks: Annotated[str, typer.Option(metavar="A,B,...", help="Tasks, groups or tags of lm-eval.")] = "",
    include_path: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="Folder with task files of your own; also repeatedly.")
    ] = None,
    time: Annotated[str, typer.Option(metavar="2h|90m", help="How long to search.")] = "",
    questions: Annotated[
        int | None, typer.Option(help="Or: how many questions to ask. Without both: 40 trials.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a commented study file. It asks for what the options leave out, if there is a terminal."""
    from merge_search.begin import Answers, begin, occupied

    if problems := occupied(study, force=force):
        raise InputError(problems)
    experts, is_terminal = expert or [], sys.stdin.isatty() and sys.stdout.isatty()
    given = {"--base PATH_OR_ID": base, "--expert [NAME=]PATH_OR_ID": experts, "--tasks A,B": tasks}
    missing = [option for option, value in given.items() if not value]
    if missing and not is_terminal:
        raise InputError(f"missing: {', '.join(missing)}; without a terminal nothing can be asked")
    if missing:
        base = base or typer.prompt("Base (folder or hub id)")
        while not experts or not expert:
            text = typer.prompt("Expert ([NAME=]folder or hub id; empty: no more)", default="", show_default=False)
            if text:
                experts.append(text)
            elif experts:
                break
        tasks = tasks or typer.prompt("Tasks of lm-eval (a,b,c)")
        if not time and questions is None:
            time = typer.prompt("Time to search (2h, 90m; empty: 40 trials)", default="", show_default=False)
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    answers = Answers(base, experts, names, include_path or (), time, questions, device)
    for text in begin(study, answers, force=force):
        out.print(f"Note: {text}.", highlight=False, markup=False, soft_wrap=True)
    out.print(
        f"{study} written. Check it: merge-search validate {study}; then search: merge-search run {study}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command()
def run(study: StudyArgument, device: DeviceOption = None) -> None:
    """Run or resume a search. After a crash, a Ctrl-C, SIGTERM or SIGUSR1, the same command goes on."""
    with _stopping():
        file = _read(study, device)
        from merge_search.search.progress import Progress
        from merge_search.search.run import run as run_study

        with Progress(err) as progress:
            result = run_study(file, progress)
        _print_result(result, study)


@app.command()
def validate(study: StudyArgument) -> None:
    """Check a study file, its models, tasks and metrics without loading any weight."""
    plan = _plan(study, is_new=True)
    dimension = len(plan.space.parameters)
    out.print(
        f"{study.name}: no problem found. {len(plan.context.experts)} experts, {plan.context.n_blocks} blocks, "
        f"{dimension} dimensions, {plan.file.search.n_trials} trials.",
        highlight=False,
    )
    for m in plan.metrics:
        counts = ", ".join(f"{n} {split}" for split, n in m.n_questions.items() if n)
        out.print(f"  {m.name}: {counts} questions", highlight=False)
    for text in (*plan.objective.weight_notes(), *plan.objective.notes, *plan.notes):
        out.print(text, highlight=False, soft_wrap=True)


@app.command(name="test")
def sealed_test(study: StudyArgument, device: DeviceOption = None) -> None:
    """Compare the best merge with base, experts, average and best preset on the sealed test questions."""
    with _stopping():
        plan = _plan(study, device)
        from merge_search.report.table import sealed_table
        from merge_search.search.records import objective_of
        from merge_search.search.verdict.sealed import open_test

        tested = open_test(plan)
        table = sealed_table(tested, *objective_of(tested))
    _show(table, "test questions (± one standard error)")


@app.command()
def export(
    study: StudyArgument,
    out_path: Annotated[Path, typer.Argument(metavar="OUT", help="Folder (or file) to write.", show_default=False)],
    trial: Annotated[int | None, typer.Option(help="Number of the trial; the best one by default.")] = None,
    mergekit: Annotated[
        bool, typer.Option("--mergekit", help="Write a mergekit YAML file instead of a model.")
    ] = False,
    adapter: AdapterOption = False,
    rank: RankOption = None,
    device: DeviceOption = None,
) -> None:
    """Write the best model, or that of a trial, as a Hugging Face folder."""
    _check_adapter(adapter, rank, mergekit)
    with _stopping():
        plan = _plan(study, device)
        from merge_search.export_trial import export_adapter_of_trial, export_mergekit, export_trial

        if adapter:
            record, report = export_adapter_of_trial(plan, out_path, number=trial, rank=rank)
            out.print(f"{record.name} written to {out_path}. {report}", highlight=False, soft_wrap=True)
            return
        if mergekit:
            record = export_mergekit(plan, out_path, number=trial)
            out.print(f"{record.name} written to {out_path}, for mergekit-yaml", highlight=False, soft_wrap=True)
            return
        record = export_trial(plan, out_path, number=trial)
    digest = record.weights_sha256
    out.print(f"{record.name} written to {out_path} (sha256 of the weights {digest})", highlight=False, soft_wrap=True)


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="recipe.json, or a mergekit YAML file.", show_default=False)],
    out_folder: OutArgument,
    adapter: AdapterOption = False,
    rank: RankOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
) -> None:
    """Merge a recipe or a mergekit file without a study."""
    _check_adapter(adapter, rank)
    if not recipe.is_file():
        raise InputError(f"no such file: {recipe}")
    with _importing():
        from merge_search.merge_adapter import merge_recipe_to_adapter
        from merge_search.merge_recipe import merge_recipe

    def note(text: str) -> None:
        err.print(text, highlight=False, markup=False, soft_wrap=True)

    with _stopping():
        if adapter:
            report = merge_recipe_to_adapter(recipe, out_folder, rank=rank, device=device, note=note)
            out.print(f"written to {out_folder}. {report}", highlight=False, soft_wrap=True)
            return
        digest = merge_recipe(recipe, out_folder, device=device, note=note)
    out.print(f"written to {out_folder} (sha256 of the weights {digest})", highlight=False, soft_wrap=True)


@app.command()
def effects(
    study: StudyArgument,
    partition: Annotated[str, typer.Option(help="What is one part: model, block, block_kind or tensor.")] = "block",
    device: DeviceOption = None,
) -> None:
    """Show what every part of each expert does to its loss, exactly and to first order, and whether these agree."""
    with _stopping():
        plan = _plan(study, device)
        from merge_search.effects import FORMS, expert_effects
        from merge_search.engine.statistics.agreement import spearman

        found = expert_effects(plan, partition, note=lambda text: err.print(text, highlight=False, soft_wrap=True))
    for expert, by_form in found.items():
        table = RichTable("part", *FORMS, title=expert, title_justify="left", box=SIMPLE)
        for part in by_form["gradient"]:
            table.add_row(part, *(f"{by_form[form].get(part, 0.0):.5f}" for form in FORMS))
        out.print(table)
        parts = list(by_form["gradient"])
        first, *exact = ([by_form[form].get(part, 0.0) for part in parts] for form in FORMS)
        pairs = zip(FORMS[1:], exact, strict=True)
        words = " and ".join(f"{spearman(first, values):.2f} with {form}" for form, values in pairs)
        out.print(f"rank correlation of the gradient form over {len(parts)} parts: {words}", highlight=False)


@app.command()
def report(
    study: StudyArgument,
    trials: Annotated[int, typer.Option(help="Number of trials to list; 0 for all.", min=0)] = 20,
) -> None:
    """Show the results of a study so far. It reads only the storage, so it also works while the study runs."""
    file = _read(study)
    from merge_search.report.table import front_table, sealed_table, summary_table, trials_table
    from merge_search.search.records import objective_of
    from merge_search.search.storage import load_study

    stored = load_study(file)
    objective, experts = objective_of(stored)
    listed = trials_table(stored, objective, n=trials or None)
    _show(listed, "trials (search questions, ± one standard error)")
    if len(objective.names) > 1:
        _show(front_table(stored, objective), "front (search questions)")
    if stored.user_attrs.get("validation"):
        _show(summary_table(stored, objective, experts), VALIDATION)
    if stored.user_attrs.get("test"):
        _show(sealed_table(stored, objective, experts), "test questions (± one standard error)")


@app.command(name="list")
def list_(
    name: Annotated[str | None, typer.Argument(help="Only the options of this preset, rule or stage.")] = None,
    options: Annotated[bool, typer.Option("--options", help="Show every option with type, bounds and source.")] = False,
) -> None:
    """Show presets, rules (measures, selections, splices, operators, post rules, transforms, statistics,
    granularities), spaces, evaluators and samplers."""
    from merge_search import catalogue
    from merge_search.presets import PRESETS
    from merge_search.rules import TABLES
    from merge_search.search.samplers import SAMPLERS

    if options or name is not None:
        _list_options(name)
        return
    table = RichTable("preset", "what it does", "source", title="presets", title_justify="left")
    for key, p in PRESETS.items():
        table.add_row(key, Text(p.summary), Text(p.paper))
    out.print(table)
    for title, rules in TABLES.items():
        shown = RichTable("name", "what it does", "options", title=title, title_justify="left")
        for key, row in rules.items():
            defaults = ", ".join(k if v is None else f"{k}={v}" for k, v in row.options.items())
            shown.add_row(key, Text(row.summary), Text(defaults))
        out.print(shown)
    for title, names in (
        ("search spaces", catalogue.names("search_spaces")),
        ("evaluators", catalogue.names("evaluators")),
        ("samplers", SAMPLERS),
    ):
        out.print(f"{title}: {', '.join(names)}", highlight=False)


def _list_options(name: str | None) -> None:
    """Show the options of a preset, rule or stage, or those of all rules and stages."""
    from merge_search.presets import PRESETS, preset_options
    from merge_search.rules import TABLES
    from merge_search.rules.describe import OptionLine, rule_options

    groups: dict[str, list[tuple[str, OptionLine]]] = {}
    if name is not None and name in PRESETS:
        groups[f"preset {name}"] = [(rule, line) for rule, line in preset_options(name)]
    for title, rules in TABLES.items():
        for key, row in rules.items():
            if name in (None, key):
                groups.setdefault(title, []).extend((key, line) for line in rule_options(row))
    if not groups:
        known = {*PRESETS, *(key for rules in TABLES.values() for key in rules)}
        raise InputError(f"no preset, rule or stage is called {name!r}{nearest(str(name), known)}")
    for title, lines in groups.items():
        header = ("rule", "option", "type", "default", "bounds or choices", "search", "source", "what it is")
        shown = RichTable(*header, title=title, title_justify="left")
        for rule, line in lines:
            shown.add_row(*map(Text, (rule, *line)))
        out.print(shown)
        if not lines:
            out.print("no options", highlight=False)
    text = (
        "A study file gives a value, a list to choose from, {bounds: [low, high], log: true}, or the word search for "
        "the search column: presets: [{NAME: {OPTION: search}}]. Presets also take allocate: MEASURE and post: [RULE]."
    )
    out.print(text, highlight=False, markup=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from merge_search import __version__

        out.print(__version__, highlight=False)
        raise typer.Exit


def _check_adapter(adapter: bool, rank: int | None, mergekit: bool = False) -> None:
    """Refuse options that do not go together."""
    if rank is not None and not adapter:
        raise InputError("--rank is the rank of a LoRA adapter; give it together with --adapter")
    if adapter and mergekit:
        raise InputError("--adapter and --mergekit ask for two different things; give one of them")


@contextmanager
def _stopping() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGUSR1 end a long command with a message and the signal's exit status.

    Typer itself would end a command that Ctrl-C stops without a word.
    """
    try:
        with stoppable():
            yield
    except KeyboardInterrupt as stop:
        err.print("stopped; nothing finished is lost, and the same command goes on from here", highlight=False)
        raise typer.Exit(exit_status(stop)) from stop


@contextmanager
def _importing() -> Iterator[None]:
    """Disable garbage collection during the import.

    Imported modules create many long-lived objects, so collecting finds nothing and adds about 50 % to the import time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            gc.enable()


def _plan(study: Path, device: str | None = None, *, is_new: bool = False) -> Plan:
    file = _read(study, device)
    from merge_search.search.prepare import prepare

    return prepare(file, is_new=is_new)


def _read(study: Path, device: str | None = None) -> StudyFile:
    """The study file with the given device. Called before anything heavy is imported, so a wrong path is told at
    once."""
    from merge_search.study_file import read_study_file

    file = read_study_file(study)
    return file if device is None else file.model_copy(update={"device": device})


def _print_result(study: optuna.Study, path: Path) -> None:
    from merge_search.report.table import summary_table
    from merge_search.search.records import objective_of
    from merge_search.search.verdict.selection import champions, nothing_to_hand_over, outdated_test

    objective, experts = objective_of(study)
    table = summary_table(study, objective, experts)
    _show(table, VALIDATION)
    if text := outdated_test(study, objective, experts):
        out.print(f"Note: {text}.", highlight=False)
    if not champions(study, objective, experts):
        out.print(f"Nothing to export: {nothing_to_hand_over(study)}", highlight=False)
        return
    choice = "it: " if len(objective.names) == 1 else "one: "
    tail = "" if len(objective.names) == 1 else " --trial N"
    out.print(f"Write {choice}merge-search export {path} OUT{tail}", highlight=False)


def _show(table: Table, title: str) -> None:
    """Print a table with its verdict below."""
    shown = RichTable(*table.header, title=title, title_justify="left", box=SIMPLE)
    for i, row in enumerate(table.rows):
        shown.add_row(*row, style="bold" if i in table.emphasised else "")
    out.print(shown)
    out.print(table.verdict, highlight=False, markup=False)


def main(args: list[str] | None = None) -> None:
    """Run the command line. Expected problems become a message and an exit status, and no traceback.

    Exit status: 0 done; 1 it cannot be done here; 2 the input must be changed; 130, 138 or 143 stopped by Ctrl-C,
    SIGUSR1 or SIGTERM.
    """
    command: Any = typer.main.get_command(app)
    try:
        sys.exit(command.main(args=args, prog_name="merge-search", standalone_mode=True))
    except InputError as error:
        err.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except MergeSearchError as error:
        err.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        text = _outage(error)
        if text is None:
            raise
        err.print(f"error: {text}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


def _outage(error: BaseException) -> str | None:
    """A sentence with what to do if the disk is full or the database is lost; None for other errors."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    for e in chain:
        is_full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or any(text in str(e) for text in ("No space left on device", "database or disk is full")):
            where = f" ({e.filename})" if isinstance(e, OSError) and e.filename else ""
            return f"the disk is full{where}: {first_line(e)}. Free some space and give the same command again; {KEPT}"
    for e in chain:
        if f"{type(e).__module__}.{type(e).__name__}" in LOST:
            return (
                f"the study's database cannot be used any more: {first_line(e)}. See that it is there, can be reached "
                "and written and is whole, and give the same command again: it goes on from the trials that are stored "
                "there"
            )
    return None
