"""One run: recipe → data → model → what trains → trainer → adapter folder and summary.json.

The wiring and nothing else; each step is in the file it is imported from.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack, nullcontext
from datetime import date
from functools import partial
from pathlib import Path

import mlx.core as mx
from rich.console import Console

from serve.model.loading import LoadedModel
from train.adapters.adapt import Adapted
from train.adapters.base import load_base
from train.adapters.build import build_adapted
from train.foresee import estimate, preflight
from train.foresee.preflight import Preflight
from train.loop.build import eyes_of, loop_settings, optimizer_of, step_settings
from train.loop.checkpoint import Checkpoint
from train.loop.distributed import agree_to_stop, check_same, join, losses_named
from train.loop.identity import facts_of
from train.loop.interrupt import caught_signals
from train.loop.keeper import Keeper
from train.loop.step import Stepper
from train.loop.together import Together, spread
from train.loop.trainer import Trainer, TrainState
from train.loop.wired import wired
from train.objectives.build import build_objective
from train.recipe.recipe import Recipe
from train.records import recording, tell
from train.start import day_of_run, folder_of_run, give_up_later, put_in_place, starting_point
from train.validation import metric_of, test_loss, validation
from train.watch import summary
from train.watch.serve_to import ServeTo
from train.watch.summary import RunSummary
from train.watch.wandb_log import check_installed


def run(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    resume: Path | str | bool | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    today: date | None = None,
    api_key: str | None = None,
) -> RunSummary:
    """Train as the recipe says, or only look (`dry_run`).

    resume     a checkpoint or a run's folder to continue; True: the last checkpoint in the recipe's adapter_path
    overwrite  the run that adapter_path holds gives way when this one has ended
    today      what a chat template prints that prints the day; None: the real one. A run that goes on keeps its own
    api_key    of the server that the recipe's serve_to names
    SIGINT and SIGTERM end the run after the step under way, with a checkpoint; the summary says so.
    Raises from the whole error tree; whatever is raised, published checkpoints stay whole.
    """
    start_s = time.perf_counter()
    with losses_named(), ExitStack() as stack:
        ranks = join()
        console = Console(quiet=True) if ranks.rank else console or Console()
        if "wandb" in (recipe.report_to or ()):
            check_installed()
        home = recipe
        server = None
        if recipe.serve_to is not None and not ranks.rank:
            server = stack.enter_context(ServeTo(recipe.serve_to, recipe.served_name, api_key))
        folder = folder_of_run(recipe, resume, ranks, dry_run=dry_run, overwrite=overwrite, console=console)
        recipe = recipe.model_copy(update={"adapter_path": str(folder)})
        day = day_of_run(recipe, resume, today or date.today(), ranks)
        flight = preflight.prepare(recipe, console, ranks, day)
        preflight.show(flight, console, with_recipe=dry_run)
        estimate.show(flight, console)
        if dry_run:
            return RunSummary("dry_run", home.adapter_path)
        model = load_base(recipe)
        # Only now: an earlier run's records give way to a run that can start.
        saved = None if ranks.rank else starting_point(recipe, resume, console)
        mx.random.seed(recipe.seed)
        adapted = build_adapted(recipe, model.network, is_restored=ranks.gather(saved is not None)[0])
        console.print(adapted.line)
        tell(console, [*model.notes, *adapted.notes])
        result = _train(flight, model, adapted, saved, console, server)
        result = dataclasses.replace(result, seconds=time.perf_counter() - start_s)
        if not ranks.rank:
            summary.write(result, folder)
            put_in_place(home, folder, result.status, console)
            if server is not None:
                has_ended = result.status in summary.ENDED
                tell(console, server.finish(Path(home.adapter_path) if has_ended else folder))
        ranks.gather(None)  # the processes end together, when everything is written
    return result


def _train(
    flight: Preflight,
    model: LoadedModel,
    adapted: Adapted,
    saved: Checkpoint | None,
    console: Console,
    server: ServeTo | None,
) -> RunSummary:
    recipe, ranks, network = flight.recipe, flight.ranks, model.network
    created = saved.config.lineage.created if saved and saved.config.lineage else ""
    lineage = flight.lineage(model, created)
    check_same(ranks, facts_of(recipe, lineage))
    optimizer = optimizer_of(recipe, network, flight.num_steps)
    objective, settings = build_objective(recipe, network), step_settings(recipe)
    if flight.reader is not None and flight.train.report.num_media:
        flight.reader.open()
    eyes = eyes_of(recipe, model)
    stepper = Stepper(
        network, optimizer, objective, settings, ranks=ranks, name_row=flight.name_row, eyes=eyes
    )
    keeper = Keeper(recipe, network, adapted, optimizer, lineage, ranks.size)
    if saved is not None:
        tell(console, keeper.go_on_from(saved))
        give_up_later(saved, keeper.folder, recipe.save_total_limit, console)
    state = TrainState.of(ranks.gather(dataclasses.asdict(saved.state if saved else TrainState()))[0])
    give_all = partial(spread, ranks, network, optimizer)
    give_all()
    records = nullcontext() if ranks.rank else recording(flight, model, keeper, saved, state, console, server)
    with records as journal, wired(), caught_signals() as caught, losses_named():
        together = Together(journal, ranks, give_all)
        answered = flight.answered(model, objective)
        metric = together.shared(metric_of(flight, model, together.say))
        Trainer(
            stepper,
            loop_settings(recipe, flight.num_iterations),
            answered.batch_at if answered else flight.batch_at,
            together,
            validation(flight, stepper, answered, metric),
            state=state,
            stop=lambda: agree_to_stop(ranks, caught),
        ).fit()
        published_step = keeper.put_best(state, together.say) if journal else None
        give_all()
        result = summary.of_run(
            state,
            keeper.folder,
            num_iterations=flight.num_iterations,
            caught=caught[0] if caught else None,
            metric=recipe.metric.name if recipe.metric else None,
            published_step=published_step,
            test_loss=test_loss(flight, stepper, answered),
            num_trainable=adapted.num_trainable,
        )
    if journal is None:
        return result
    result = dataclasses.replace(result, content_hash=keeper.publish(state))
    journal.curve.draw()
    return result
