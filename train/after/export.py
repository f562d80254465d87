"""An adapter and its base become one ordinary Hugging Face folder, with a measured proof of what was lost.

The fuse is done in full precision (a quantized base is dequantized first) and nothing is re-quantized unless
asked. The folder is then read back from disk and compared with base + adapter, which was never fused.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx.utils import tree_unflatten
from rich.console import Console

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.files import read_adapter
from serve.errors import ConfigError, StorageError
from serve.model.loading import load, resolve
from serve.model.loading import read_config as read_model_config
from serve.model.network import Network
from serve.model.towers import has_towers
from serve.model.weights import dequantize as dequantize_all
from serve.tables import Table, show, words
from train.adapters.adapt import adapted_layers
from train.adapters.on_base import load_adapted as load_adapted
from train.after import place
from train.after.base import check_nothing_is_lost, find_base
from train.after.chat_files import chat_notes, write_chat_files
from train.after.fidelity import Rows, compare, eyes_of, features_apart, held_out
from train.after.folder import WEIGHTS_FILES, Written, write_model
from train.after.folder import Form as Form
from train.loop.whole import write_synced

FIDELITY_FILE = "fidelity.json"
MOST_APART = 0.75
"""Of features of packed towers; rounding to 4 bits moves those of random ones by a third."""


@dataclass(frozen=True)
class ExportReport:
    """`fidelity.json`. Agreement of the exported folder with base + adapter, at the targets of held-out rows.

    KL is KL(base + adapter ‖ exported) in nats a token.
    """

    out: str
    adapter: str
    base: str
    bits: int | None
    group_size: int | None
    dtype: str
    top1_agreement: float
    kl_mean: float
    kl_max: float
    num_tokens: int
    num_rows: int
    num_bytes: int
    seconds: float
    rows_from: str
    """Where the rows are from, in words."""
    num_rows_found: int
    """Rows there; more than `num_rows` where only some were compared on."""
    num_rows_showing: int = 0
    """Of the rows compared on, those with pictures, clips or sounds."""
    unpacked: tuple[str, ...] = ()
    """What could not be quantized as asked, and is stored as it is."""
    towers: Literal["plain", "quantized"] | None = None
    """How towers and projectors are stored; None: it is a text model."""
    features_apart: float | None = None
    """How far what the towers make of a picture is from base + adapter's, at the worst: ‖difference‖ / ‖features‖.
    None: nothing was shown."""


def export(
    adapter: Path,
    out: Path,
    form: Form | None = None,
    *,
    base: str | None = None,
    rows: Rows | None = None,
    force: bool = False,
    console: Console | None = None,
) -> ExportReport:
    """Fuse, write, read back, compare. The adapter may be in any layout that is served.

    base   where the base is; None: where the adapter's manifest says, see `find_base`
    rows   what to compare on
    force  overwrite an earlier export, and take an adapter made for another base
    Raises AdapterError, ConfigError, ModelError, DataError, StorageError; a failed export leaves `out` as it was.
    """
    start_s = time.perf_counter()
    console, form, out = console or Console(), form or Form(), _checked_place(out)
    form.check()
    with place.writing(out) as partial:
        _check_out(out, force)
        config = read_adapter(adapter).config
        name = find_base(adapter, config, base)
        check_nothing_is_lost(name, has_towers=has_towers(read_model_config(resolve(name))))
        reference = load_adapted(adapter, config, name, is_other_base_fine=force)
        check_nothing_is_lost(name, has_towers=reference.network.has_towers)
        form.check_fits(reference.network, name)
        found = held_out(adapter, rows or Rows(), reference, config.lineage)
        for line in (f"fusing {adapter} into {name}", f"comparing on {found.line}", *found.notes):
            console.print(line, highlight=False, soft_wrap=True)
        try:
            written = write_fused(partial, adapter, config, name, form)
            exported = load(str(partial))
            eyes = eyes_of(reference), eyes_of(exported)
            apart = features_apart(found.batches, eyes)
            if form.quantize_vision:
                check_still_sees(apart)
            agreement = compare(reference.network, exported.network, found.batches, eyes)
            report = ExportReport(
                out=str(out),
                adapter=str(adapter),
                base=name,
                bits=form.bits,
                group_size=form.group_size if form.bits else None,
                dtype=written.dtype,
                unpacked=written.unpacked,
                towers=written.towers,
                features_apart=apart,
                rows_from=found.source,
                num_rows_found=found.num_found,
                num_rows_showing=found.num_showing,
                num_bytes=sum(file.stat().st_size for file in partial.glob(WEIGHTS_FILES)),
                seconds=time.perf_counter() - start_s,
                **agreement,
            )
            write_synced(partial / FIDELITY_FILE, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
            place.publish(partial, out)
        except OSError as error:
            raise StorageError(f"{out}: the export could not be written: {error}") from error
    show(console, _table(report))
    for note in chat_notes(config.lineage, reference):
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return report


def check_still_sees(apart: float | None) -> None:
    """ConfigError where a packed tower makes something else of pictures: some families' code reads the weights of
    their layers, or their dtype, without unpacking them. Nothing is said where nothing was shown."""
    if apart is not None and not apart <= MOST_APART:
        raise ConfigError(
            f"--quantize-vision: packed, its towers see something else (features are {apart:.2f} of their length "
            f"apart): this family's code reads weights of packed layers; leave the option out"
        )


def _checked_place(out: Path) -> Path:
    """The folder to write, its name made out. ConfigError for the folder one is in: it is put in its place whole."""
    whole = out.resolve()
    here = Path.cwd()
    if whole == here or whole in here.parents:
        raise ConfigError(
            f"{out} is the folder you are in, or above it; an export is put in its place whole, so name a folder "
            f"that it makes: {out / 'exported'}"
        )
    return whole if out.is_symlink() or not out.name or out.name == ".." else out


def fuse(network: Network) -> None:
    """Fold every adapted layer into a plain one, and dequantize the rest, in place."""
    fused = [(path, layer.fuse()) for path, layer in adapted_layers(network).items()]
    network.module.update_modules(tree_unflatten(fused))
    dequantize_all(network.module)


def write_fused(folder: Path, adapter: Path, config: AdapterConfig, base: str, form: Form) -> Written:
    """Write the fused model as a Hugging Face folder, into one that is there and empty."""
    model = load_adapted(adapter, config, base, dequantize=True, is_other_base_fine=True)
    fuse(model.network)
    written = write_model(folder, model, form)
    if config.lineage is not None:
        write_chat_files(folder, config.lineage, model)
    return written


def _check_out(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; an export is a folder")
    if not any(out.iterdir()):
        return
    if not (out / FIDELITY_FILE).exists():
        raise ConfigError(
            f"{out} is not empty and not an export (it has no {FIDELITY_FILE}); it is left alone"
        )
    if not force:
        raise ConfigError(f"{out} holds an export already; --force replaces it")


def _table(report: ExportReport) -> Table:
    table = Table("what", words("measured"), title=f"{report.out}", has_headings=False)
    form = f"{report.bits} bit, groups of {report.group_size}" if report.bits else report.dtype
    table.add("weights", f"{form}, {report.num_bytes / 1e6:,.1f} MB")
    if report.towers is not None:
        how = "quantized" if report.towers == "quantized" else report.dtype
        seen = "" if report.features_apart is None else f", features apart by {report.features_apart:.1e}"
        table.add("towers and projectors", f"{how}{seen}")
    if report.unpacked:
        table.add("not quantized", f"{len(report.unpacked)} layers: {', '.join(report.unpacked)}")
    table.add("top-1 agreement", f"{report.top1_agreement:.2%} of {report.num_tokens:,} target tokens")
    table.add("KL(base + adapter ‖ export)", f"mean {report.kl_mean:.2e}, max {report.kl_max:.2e} nats")
    some = f" of {report.num_rows_found:,}" if report.num_rows < report.num_rows_found else ""
    showing = f", {report.num_rows_showing:,} of them with media" if report.towers is not None else ""
    table.add("rows", f"{report.num_rows:,}{some}, {report.rows_from}{showing}")
    return table
