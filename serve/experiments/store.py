"""Exposures and outcomes in SQL: SQLite by default, PostgreSQL by URL. Calls block; run them off the event loop.

A *run* is one definition of an experiment (salt, variants, weights). Changing it starts another run, whose units
are not mixed with the old one's; replicas with the same definition share one. Knows nothing of HTTP, engines or
statistics.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from serve.errors import ConfigError, NotFoundError, StorageError
from serve.experiments.assignment import RULE, Experiment, Variant
from serve.experiments.records import Drop, Exposure, Outcome, Record, Run, RunCounts

SQLITE_BUSY_TIMEOUT_S = 10.0

metadata = sa.MetaData()
runs = sa.Table(
    "experiment_runs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("experiment", sa.String, nullable=False),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("definition", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("activated_at", sa.Float, nullable=False),
    sa.UniqueConstraint("experiment", "digest"),
)
exposures = sa.Table(
    "exposures",
    metadata,
    sa.Column("completion_id", sa.String, primary_key=True),
    sa.Column("run_id", sa.Integer, sa.ForeignKey("experiment_runs.id"), nullable=False, index=True),
    sa.Column("variant", sa.String, nullable=False),
    sa.Column("unit", sa.String, nullable=False),
    sa.Column("model_version", sa.String, nullable=False),
    sa.Column("content_hash", sa.String, nullable=False),
    sa.Column("exposed_at", sa.Float, nullable=False),
    sa.Column("ttft_s", sa.Float, nullable=False),
    sa.Column("latency_s", sa.Float),
    sa.Column("num_tokens", sa.Integer),
    sa.Column("finish", sa.String),
)
outcomes = sa.Table(
    "outcomes",
    metadata,
    sa.Column("completion_id", sa.String, sa.ForeignKey("exposures.completion_id"), primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.Float, nullable=False),
    sa.Column("reported_at", sa.Float, nullable=False),
)
drops = sa.Table(
    "dropped_outcomes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.Integer, sa.ForeignKey("experiment_runs.id"), nullable=False, index=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("num_outcomes", sa.Integer, nullable=False),
    sa.Column("dropped_at", sa.Float, nullable=False),
)


class Store:
    """The tables behind one SQLAlchemy URL. Thread-safe."""

    def __init__(self, url: str, *, create: bool = True) -> None:
        """create=False refuses a SQLite file that does not exist, instead of making an empty one."""
        self.url = _parse_url(url)
        path = sqlite_path(url)
        if path is not None and not create and not path.exists():
            raise NotFoundError(
                f"store {url}: no such file {path}; serve an experiment first, or name its store"
            )
        with _told(self.url):
            self._engine = sa.create_engine(self.url)
            if self.url.get_backend_name() == "sqlite":
                sa.event.listen(self._engine, "connect", _prepare_sqlite)
            if create:
                metadata.create_all(self._engine)

    def close(self) -> None:
        """Drop all connections."""
        self._engine.dispose()

    def begin_run(self, experiment: Experiment) -> Run:
        """The run with this definition, made if it is new; from here on it is the newest."""
        definition = json.dumps({**asdict(experiment), "rule": RULE}, sort_keys=True)
        now = time.time()
        statement = (
            self._insert(runs)
            .values(
                experiment=experiment.name,
                digest=hashlib.sha256(definition.encode()).hexdigest(),
                definition=definition,
                started_at=now,
                activated_at=now,
            )
            .on_conflict_do_update(index_elements=["experiment", "digest"], set_={"activated_at": now})
            .returning(runs.c.id, runs.c.started_at)
        )
        with _told(self.url), self._engine.begin() as connection:
            found = connection.execute(statement).one()
        return Run(int(found.id), experiment, float(found.started_at))

    def expose(self, exposure: Exposure) -> None:
        """Write an exposure; a second one with the same completion id changes nothing."""
        statement = self._insert(exposures).values(asdict(exposure))
        with _told(self.url), self._engine.begin() as connection:
            connection.execute(statement.on_conflict_do_nothing(index_elements=["completion_id"]))

    def complete(self, completion_id: str, *, latency_s: float, num_tokens: int, finish: str) -> None:
        """Add how an exposed completion ended."""
        values = {"latency_s": latency_s, "num_tokens": num_tokens, "finish": finish}
        statement = exposures.update().where(exposures.c.completion_id == completion_id).values(values)
        with _told(self.url), self._engine.begin() as connection:
            connection.execute(statement)

    def record_outcome(self, completion_id: str, name: str, value: float) -> None:
        """Write one outcome; the last value of a (completion, name) counts. NotFoundError: never exposed."""
        values = {"completion_id": completion_id, "name": name, "value": value, "reported_at": time.time()}
        statement = (
            self._insert(outcomes)
            .values(values)
            .on_conflict_do_update(index_elements=["completion_id", "name"], set_={"value": value})
        )
        known = sa.select(exposures.c.completion_id).where(exposures.c.completion_id == completion_id)
        with _told(self.url), self._engine.begin() as connection:
            if connection.execute(known).first() is None:
                raise NotFoundError(
                    f"id: no exposure of completion {completion_id!r} is recorded; "
                    "feedback goes to completions that an experiment's model name answered"
                )
            connection.execute(statement)

    def runs(self, experiment: str) -> list[RunCounts]:
        """The runs under this name, the one now serving first. NotFoundError names the experiments there are."""
        of_name = sa.select(runs).where(runs.c.experiment == experiment)
        newest_first = of_name.order_by(runs.c.activated_at.desc(), runs.c.id.desc())
        with _told(self.url), self._engine.connect() as connection:
            stored = connection.execute(newest_first).all()
            if not stored:
                there = ", ".join(self.experiments()) or "none"
                raise NotFoundError(
                    f"experiment {experiment!r} is not in {self.url}; experiments there: {there}"
                )
            numbers = [run.id for run in stored]
            num_exposures: dict[int, int] = dict(
                connection.execute(
                    sa.select(exposures.c.run_id, sa.func.count())
                    .where(exposures.c.run_id.in_(numbers))
                    .group_by(exposures.c.run_id)
                ).all()
            )
            num_outcomes: dict[int, dict[str, int]] = {}
            for run_id, name, count in connection.execute(
                sa.select(exposures.c.run_id, outcomes.c.name, sa.func.count())
                .join_from(outcomes, exposures)
                .where(exposures.c.run_id.in_(numbers))
                .group_by(exposures.c.run_id, outcomes.c.name)
                .order_by(outcomes.c.name)
            ):
                num_outcomes.setdefault(run_id, {})[name] = count
        return [
            RunCounts(
                Run(int(run.id), _experiment(run.definition), float(run.started_at)),
                float(run.activated_at),
                num_exposures.get(run.id, 0),
                num_outcomes.get(run.id, {}),
            )
            for run in stored
        ]

    def experiments(self) -> list[str]:
        """The names of all experiments, in order."""
        names = sa.select(runs.c.experiment).distinct().order_by(runs.c.experiment)
        with _told(self.url), self._engine.connect() as connection:
            return list(connection.execute(names).scalars())

    def newest_run(self, experiment: str) -> Run:
        """The run now serving under this name. NotFoundError names the experiments there are."""
        return self.runs(experiment)[0].run

    def drop_outcome(self, run_id: int, name: str) -> int:
        """Delete every outcome of this name in a run, and keep a record that it was done. Returns how many."""
        of_run = sa.select(exposures.c.completion_id).where(exposures.c.run_id == run_id)
        named = sa.and_(outcomes.c.name == name, outcomes.c.completion_id.in_(of_run))
        with _told(self.url), self._engine.begin() as connection:
            drops.create(connection, checkfirst=True)
            count = connection.execute(outcomes.delete().where(named)).rowcount
            if count:
                record = {"run_id": run_id, "name": name, "num_outcomes": count, "dropped_at": time.time()}
                connection.execute(drops.insert().values(record))
        return int(count)

    def drops(self, run_id: int) -> list[Drop]:
        """What was deleted from a run by hand, in order of time."""
        of_run = sa.select(drops).where(drops.c.run_id == run_id).order_by(drops.c.id)
        with _told(self.url), self._engine.connect() as connection:
            if not sa.inspect(connection).has_table(drops.name):
                return []
            stored = connection.execute(of_run).all()
        return [Drop(each.name, int(each.num_outcomes), float(each.dropped_at)) for each in stored]

    def records(self, run_id: int) -> list[Record]:
        """Every exposure of a run with its outcomes, in the order of exposure."""
        of_run = sa.select(exposures).where(exposures.c.run_id == run_id)
        reported = sa.select(outcomes).join(exposures).where(exposures.c.run_id == run_id)
        with _told(self.url), self._engine.connect() as connection:
            found = connection.execute(of_run.order_by(exposures.c.exposed_at)).mappings().all()
            values: dict[str, dict[str, Outcome]] = {}
            for each in connection.execute(reported):
                outcome = Outcome(float(each.value), float(each.reported_at))
                values.setdefault(each.completion_id, {})[each.name] = outcome
        return [_record(each, values.get(each["completion_id"], {})) for each in found]

    def _insert(self, table: sa.Table) -> Any:
        """INSERT with ON CONFLICT, which SQLAlchemy spells per dialect."""
        return (postgresql if self.url.get_backend_name() == "postgresql" else sqlite).insert(table)


def sqlite_path(url: str) -> Path | None:
    """The file behind a SQLite URL; None for other databases and for in-memory ones."""
    parsed = _parse_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database))


def _parse_url(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except SQLAlchemyError:
        raise ConfigError(
            f"store: {url!r} is no SQLAlchemy URL; expected e.g. sqlite:///lathe.sqlite or postgresql://…"
        ) from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(f"store: found {parsed.get_backend_name()}; expected sqlite or postgresql")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError("store: an in-memory SQLite is another database in each thread; name a file")
    return parsed


@contextmanager
def _told(url: sa.URL) -> Iterator[None]:
    """Database failures as StorageError that names the store; URL passwords stay hidden."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = error.__cause__ or error
        raise StorageError(f"store {url}: {cause}") from error
    except ModuleNotFoundError as error:
        raise ConfigError(f"store {url}: its driver {error.name!r} is not installed") from error


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # WAL: a report reads while the server writes. NORMAL: a crash of the machine may lose the last commits only.
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.execute(f"PRAGMA busy_timeout={int(SQLITE_BUSY_TIMEOUT_S * 1000)}")
    cursor.close()


def _experiment(definition: str) -> Experiment:
    data = json.loads(definition)
    return Experiment(data["name"], data["salt"], tuple(Variant(**variant) for variant in data["variants"]))


def _record(found: sa.RowMapping, values: Mapping[str, Outcome]) -> Record:
    names = [name for name in Record.__dataclass_fields__ if name != "outcomes"]
    return Record(**{name: found[name] for name in names}, outcomes=values)
