"""Open Optuna's storage, let one process run a study at a time, and reclaim the trials of a killed process.

SQLite runs with a write-ahead log, so that readers never block the running search. Other databases run as SQLAlchemy
opens them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import optuna
import sqlalchemy
from optuna.trial import TrialState

from merge_search._compat.optuna import set_user_attribute
from merge_search.errors import StorageError, StudyChangedError, StudyFileError, first_line
from merge_search.outcome import Outcome
from merge_search.search.process_record import PROCESS, cause_of_death, this_process
from merge_search.study_file import StudyFile

__all__ = [
    "check_identity",
    "describe_changes",
    "driver_lock",
    "load_study",
    "mark_interrupted",
    "open_storage",
    "reclaim_lost_trials",
]


def open_storage(url: str, *, must_exist: bool = False) -> optuna.storages.RDBStorage:
    """Open the storage at `url`.

    Args:
        url: As SQLAlchemy takes it.
        must_exist: Refuse a SQLite file that does not exist. Otherwise it is created.

    Raises:
        StorageError: The URL is not that of a database, its driver is not installed, or it cannot be reached.
    """
    connect = {"timeout": 120} if url.startswith("sqlite:") else {}
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        if must_exist and not path.is_file():
            raise StorageError(f"there is no database {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": connect})
    except ImportError as error:
        raise StorageError(
            f"storage {_without_password(url)!r} needs a driver that is not installed; for PostgreSQL: pip install "
            "'merge-search[postgresql]' and a URL that begins with postgresql+psycopg://"
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        raise StorageError(
            f"storage {_without_password(url)!r} cannot be opened: {first_line(error)}; see that it is there, can be "
            "reached and written and is whole, or name another under study.storage"
        ) from error
    if url.startswith("sqlite:"):
        sqlalchemy.event.listens_for(storage.engine, "connect")(_write_ahead_log)
        storage.engine.dispose()  # the connection from before the listener has no write-ahead log
    return storage


def _write_ahead_log(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _without_password(url: str) -> str:
    try:
        return str(sqlalchemy.engine.make_url(url).render_as_string(hide_password=True))
    except sqlalchemy.exc.ArgumentError:
        return url


def load_study(file: StudyFile) -> optuna.Study:
    """The stored study of a study file.

    Raises:
        StudyFileError: The study has not been run yet.
        StorageError: The storage cannot be reached.
    """
    url = file.storage_url
    missing = (
        f"storage {_without_password(url)} has no study {file.study.name!r}; "
        f"run 'merge-search run {file.path.name}' first"
    )
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        raise StudyFileError(missing)
    try:
        return optuna.load_study(study_name=file.study.name, storage=open_storage(url))
    except KeyError:
        raise StudyFileError(missing) from None


@contextmanager
def driver_lock(storage: optuna.storages.RDBStorage, url: str, name: str) -> Iterator[None]:
    """Hold the study `name` for this process. The lock ends with the process, however that ends.

    Raises:
        StorageError: Another process runs the study now, or the database has no lock that ends with its process.
    """
    message = f"study {name!r} in {_without_password(url)} is being run by another process; wait for it or stop it"
    if url.startswith("sqlite:///"):
        with _file_lock(Path(url.removeprefix("sqlite:///")), name, message):
            yield
    elif storage.engine.dialect.name == "postgresql":
        key = int.from_bytes(hashlib.sha256(f"merge-search:{name}".encode()).digest()[:8], "big", signed=True)
        with storage.engine.connect() as connection:
            if not connection.execute(sqlalchemy.text("SELECT pg_try_advisory_lock(:k)"), {"k": key}).scalar():
                raise StorageError(message)
            yield
    else:
        raise StorageError(
            f"storage {_without_password(url)!r} must be sqlite:///FILE or PostgreSQL: only there can two drivers of "
            "one study be kept apart"
        )


@contextmanager
def _file_lock(database: Path, name: str, message: str) -> Iterator[None]:
    import fcntl

    path = database.with_name(f"{database.name}.{name}.lock")
    handle: IO[str]
    with path.open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise StorageError(f"{message} ({handle.read().strip() or 'process unknown'})") from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()}")
        handle.flush()
        yield


TRIES = 3
"""Number of processes that may die alone in a point before the point is given up as one that kills its process."""
MOST_LOST = 10
"""Number of processes that may end in a point for any unknown reason before the point is given up without blame."""
INTERRUPTED = "interrupted"
"""User attribute of a trial whose run was stopped (by Ctrl-C, for instance), which is no evidence against its point."""
DEATH = "death"
"""User attribute of a lost trial whose process died alone in it: what it died of (`process_record`)."""


def mark_interrupted(study: optuna.Study) -> None:
    """Mark all running trials. Call this while holding `driver_lock`, when the run is stopped."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        set_user_attribute(study, trial, INTERRUPTED, True)


def reclaim_lost_trials(study: optuna.Study) -> list[str]:
    """Queue the points of trials that a killed process left running again, and close those trials.

    The point is queued before the trial is closed. If the process is killed in between, the next call finds the point
    queued and closes the trial. A trial with neither parameters nor a baseline's label had not begun and is only
    closed. The new trial's ``retry_of`` is the number of the first try. Call this while holding `driver_lock`.

    A point in which `TRIES` processes died alone (out of main memory, or a crash in a driver) is given up with the
    outcome ``died``, which samplers avoid. A run that was stopped, a machine that went away and a process that left no
    record do not count. A point in which `MOST_LOST` processes ended without being stopped is given up, too, and stays
    ``lost``.

    Returns:
        A sentence for each trial that had begun.
    """
    trials = study.get_trials(deepcopy=False)
    sentences, now = [], this_process()
    for trial in (t for t in trials if t.state == TrialState.RUNNING):
        keep = {k: v for k, v in trial.user_attrs.items() if k in ("label", "given_recipe", "given_fit")}
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        first = trial.user_attrs.get("retry_of", trial.number)
        tries = [t for t in trials if first in (t.number, t.user_attrs.get("retry_of"))]
        ends = [t.user_attrs for t in tries if t.number <= trial.number and INTERRUPTED not in t.user_attrs]
        deaths = [attributes[DEATH] for attributes in ends if DEATH in attributes]
        if INTERRUPTED not in trial.user_attrs and (cause := cause_of_death(trial.user_attrs.get(PROCESS), now)):
            set_user_attribute(study, trial, DEATH, cause)
            deaths.append(cause)
        outcome = Outcome.DIED if len(deaths) >= TRIES else Outcome.LOST
        if outcome is Outcome.DIED or len(ends) >= MOST_LOST:
            reason = _why_given_up(len(ends), deaths)
            set_user_attribute(study, trial, "reason", reason)
            sentences.append(f"trial {trial.number} of a killed run is given up: {reason}")
        elif params or keep:
            if not any(t.number > trial.number for t in tries):
                study.enqueue_trial(params, user_attrs={**keep, "retry_of": first})
            sentences.append(f"trial {trial.number} of a killed run is closed, and its point queued again")
        set_user_attribute(study, trial, "outcome", str(outcome))
        study.tell(trial.number, state=TrialState.FAIL)
    return sentences


def _why_given_up(n_ends: int, deaths: list[str]) -> str:
    if len(deaths) >= TRIES:
        return f"its process died {len(deaths)} times in it ({', '.join(dict.fromkeys(deaths))})"
    return (
        f"{n_ends} processes ended in it without a trace, so perhaps no machine stays for as long as the trial takes; "
        "the point is not blamed for it"
    )


def describe_changes(old: Any, new: Any, at: str = "") -> list[str]:
    """A sentence for every place where two JSON values differ.

    >>> describe_changes({"seed": 0, "fit": {"n": 2}}, {"seed": 1, "fit": {"n": 2}})
    ['seed: was 0, is now 1']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        out = []
        for key in [*old, *(k for k in new if k not in old)]:
            here = f"{at}.{key}" if at else str(key)
            if key not in new:
                out.append(f"{here}: was {_short(old[key])}, is now absent")
            elif key not in old:
                out.append(f"{here}: is new: {_short(new[key])}")
            else:
                out += describe_changes(old[key], new[key], here)
        return out
    return [] if old == new else [f"{at}: was {_short(old)}, is now {_short(new)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 70 else text[:33] + " ... " + text[-33:]


def check_identity(study: optuna.Study, identity: Mapping[str, Any]) -> None:
    """Store the study's identity, or compare it with the stored one.

    Raises:
        StudyChangedError: Models, tasks, splits, objective, space or seed differ. It shows each difference.
    """
    stored = study.user_attrs.get("identity")
    if stored is None:
        study.set_user_attr("identity", dict(identity))
        return
    changes = describe_changes(stored, dict(identity))
    if changes:
        lines = "\n".join(f"  - {c}" for c in changes)
        raise StudyChangedError(
            f"study {study.study_name!r} was made with other settings, and its trials cannot be compared with new "
            f"ones:\n{lines}\nUndo the change, or give the study another name (study.name) to begin a new one."
        )
