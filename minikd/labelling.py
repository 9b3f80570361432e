"""`minikd label`: a teacher's logits of every row of a data set, kept in a store for as many students as you like."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from minikd import store
from minikd.data import Dataset, load
from minikd.data.archive import mapped_npy
from minikd.errors import DataError, MinikdError
from minikd.kernels.threads import VARIABLES
from minikd.report.table import Table, has_rich, show
from minikd.store.encoding import REALS
from minikd.teachers import as_teacher

NAME = "minikd label"
EXAMPLE = """\
examples:
  minikd label digits --teacher runs/mine/teacher.safetensors --out stores/digits
  minikd label images.npz --teacher large.onnx --out stores/images --dtype float16
  minikd label table.csv --label-column kind --teacher forest.joblib --allow-pickle --processes 4 --out stores/table

A run that was ended goes on where it was when the same command is given again."""
SECONDS_BETWEEN_LINES = 10.0
# Where an error is raised, and the argument that it names → how this command calls it.
OPTION_OF = {
    ("data.load", "source"): "DATA",
    ("as_teacher", "x"): "--teacher",
    ("as_teacher", "gives"): "--gives",
    ("store.write", "top_k"): "--top-k",
    ("store.write", "rows_per_shard"): "--rows-per-shard",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minikd label`."""
    parser.usage = f"{NAME} DATA --teacher FILE --out FOLDER [options]"
    add = parser.add_argument
    add("data", metavar="DATA", help="as for minikd distill --data; or features alone, rows of an array in a .npy file")
    teachers = "a model (.onnx, .safetensors, .joblib, .pkl), a table (.npy, .npz, .csv), or another store"
    add("--teacher", metavar="FILE", required=True, help=teachers)
    add("--out", metavar="FOLDER", required=True, help="the store: a new folder, or one that was not finished")
    add("--gives", choices=("logits", "probabilities"), help="what the model gives, where its file does not say")
    add("--dtype", choices=tuple(REALS), default="float32", help="of the stored logits (default: float32)")
    add("--top-k", metavar="K", type=int, default=0, help="keep the K largest logits of each row (default: all)")
    add("--rows-per-shard", metavar="N", type=int, help="rows in one file (default: 16384, fewer where they are large)")
    add("--label-column", metavar="TEXT", default="label", help="of a CSV file (default: label)")
    add("--processes", metavar="N", type=_count, default=1, help="that ask the teacher at once (default: 1)")
    add("--allow-pickle", action="store_true", help="read pickles, which run whatever code they hold")
    add("--overwrite", action="store_true", help="replace a store in the folder")
    add("--quiet", action="store_true", help="no progress and no summary")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1; got {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Label, and say what there is now and what to do with it; returns the exit code."""
    meter = _meter(sys.stderr, options.quiet)
    with _naming():
        data = _features(options.data) if options.data.endswith(".npy") else _data_set(options)
        names = data.class_names if isinstance(data, Dataset) else None
        told = {"class_names": names, "gives": options.gives, "allow_pickle": options.allow_pickle}
        teacher = as_teacher(options.teacher, **told)
        try:
            with meter, _workers(options.processes) as workers:
                found = store.write(
                    options.out,
                    teacher,
                    data,
                    dtype=options.dtype,
                    top_k=options.top_k,
                    rows_per_shard=options.rows_per_shard,
                    executor=workers,
                    in_flight=2 * options.processes,
                    on_progress=meter,
                    overwrite=options.overwrite,
                )
        except KeyboardInterrupt:
            print("\nWhat is labelled stays: the same command goes on from there.", file=sys.stderr)
            raise
    if not options.quiet:
        show(summary(found, meter.last), sys.stdout)
        print(f"\nUse it in place of the teacher: {_use(options)}")
    return 0


def _data_set(options: argparse.Namespace) -> Dataset:
    return load(options.data, label_column=options.label_column)


def _features(path: str) -> np.ndarray:
    """Features alone, mapped into memory."""
    try:
        return mapped_npy(Path(path))
    except DataError as error:
        fix = "Save one array of numbers by np.save."
        raise DataError(NAME, path, expected="an array of features", got=error.got, fix=fix) from error


@contextmanager
def _naming() -> Iterator[None]:
    """An error about an option calls it by its name."""
    try:
        yield
    except MinikdError as error:
        option = OPTION_OF.get((error.where, error.argument))
        if option is None:
            raise
        raise type(error)(NAME, option, expected=error.expected, got=error.got, fix=error.fix) from error


@contextmanager
def _workers(processes: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that share the cores, unless the environment gives each a number of threads; none for one process."""
    if processes == 1:
        yield None
        return
    for name in (*VARIABLES, "MINIKD_NUM_THREADS"):  # they read them when they start
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // processes)))
    with ProcessPoolExecutor(processes, get_context("spawn"), _follow_the_parent) as pool:
        yield pool


def _follow_the_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it, even where the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after_the_parent, daemon=True).start()


def _end_after_the_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# --- what is printed ---


class _Meter:
    """Is called with each `store.Progress`, inside a with statement; this one only remembers the last."""

    last = store.Progress(0, 0, 0, 0.0)

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to put away."""

    def __call__(self, progress: store.Progress) -> None:
        self.last = progress
        self.tell(progress)

    def tell(self, progress: store.Progress) -> None:
        """Show where the labelling is; nothing here."""


class _Lines(_Meter):
    """A line every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._told = stream, time.monotonic()

    def tell(self, progress: store.Progress) -> None:
        if time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            print(f"{progress.rows:,} of {progress.total:,} rows, {speed(progress)}", file=self._stream, flush=True)


class _Bar(_Meter):
    """A bar, which vanishes at the end."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("labelling"),
            BarColumn(None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        console = Console(file=stream)
        self._bars: Any = Progress(*columns, console=console, transient=True, expand=True, refresh_per_second=5)
        self._task = self._bars.add_task("", total=None, figures="")

    def __enter__(self) -> _Meter:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def tell(self, progress: store.Progress) -> None:
        figures = f"{progress.rows:,} of {progress.total:,} rows, {speed(progress)}"
        self._bars.update(self._task, total=progress.total, completed=progress.rows, figures=figures)


def _meter(stream: TextIO, quiet: bool) -> _Meter:
    return _Meter() if quiet else _Bar(stream) if has_rich(stream) else _Lines(stream)


def speed(progress: store.Progress) -> str:
    """Rows per second of this run."""
    rows = progress.rows - progress.found
    return f"{rows / progress.seconds:,.0f} rows/s" if rows and progress.seconds else "no rows yet"


def summary(found: store.Store, progress: store.Progress) -> Table:
    """What a store holds, what it takes and costs, and how fast it came about."""
    spec, labelled = found.spec, progress.rows - progress.found
    kept = f"the {spec.top_k} largest of {found.classes:,} classes" if spec.top_k else f"all {found.classes:,} classes"
    before = f"; {progress.found:,} were there already" if progress.found else ""
    time_taken = f"{labelled:,} rows in {progress.seconds:.1f} s, {speed(progress)}{before}"
    rows = [
        ("rows", f"{len(found):,}, {spec.row_order}; {spec.features}"),
        ("logits", f"{spec.dtype}, {kept}, as the teacher gave them"),
        ("teacher", found.identity),
        ("on disk", f"{found.bytes:,} bytes in {spec.shards:,} shard{'s' * (spec.shards > 1)}, in {found.path}"),
        ("error", error_in_words(found)),
        ("time", time_taken if labelled else "all rows were there already"),
    ]
    return Table(("", ""), "<<", rows)


def error_in_words(found: store.Store) -> str:
    """KL(teacher ‖ stored), mean and largest, at each temperature at which it was measured."""
    if found.spec.dtype == "float32" and not found.spec.top_k:
        return "none: all logits, in float32"
    each = [f"{e['mean']:.2g} at T = {e['temperature']:g} (at most {e['max']:.2g})" for e in found.kl_error]
    return f"KL(teacher ‖ stored), mean over the rows: {', '.join(each)}"


def _use(options: argparse.Namespace) -> str:
    if options.data.endswith(".npy"):
        return f"kd.as_teacher({options.out!r}).logits(None, rows)"
    return f"minikd distill --data {shlex.quote(options.data)} --teacher {shlex.quote(options.out)}"
