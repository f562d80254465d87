"""The experiments of a server: their public names, their runs in the store, and who writes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.experiments.assignment import Experiment
from serve.experiments.recorder import Recorder
from serve.experiments.records import Run


@dataclass(frozen=True)
class ServedExperiments:
    """Of all models together. Owned by whoever opened them."""

    runs: Mapping[str, Run]
    """By public name."""
    recorder: Recorder | None
    """None without experiments."""

    @classmethod
    def open(cls, experiments: Sequence[Experiment], store_url: str) -> ServedExperiments:
        """Begin their runs, or go on with them. Raises what Store does."""
        if not experiments:
            return cls({}, None)
        from serve.experiments.store import Store  # and SQLAlchemy, a tenth of a second

        recorder = Recorder(Store(store_url))
        try:
            runs = [recorder.store.begin_run(each) for each in experiments]
        except BaseException:
            recorder.close()
            raise
        return cls({run.experiment.name: run for run in runs}, recorder)

    def close(self) -> None:
        """Finish writing."""
        if self.recorder is not None:
            self.recorder.close()
