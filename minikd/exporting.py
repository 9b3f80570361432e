"""`minikd export` and `minikd size`: a student as a file for another program, and proof that it computes the same."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minikd import metrics
from minikd.data import Dataset, load
from minikd.errors import ArgumentError, DataError
from minikd.export.c import to_c
from minikd.export.finetune import EPOCHS, finetune
from minikd.export.network import Network
from minikd.export.onnx import OPSETS, to_onnx
from minikd.export.onnx_check import check_onnx
from minikd.export.quantise import CALIBRATIONS, Quantised, quantise
from minikd.export.size import sizes
from minikd.export.verify import compiler, verify
from minikd.model_file import load as load_model
from minikd.model_file import save
from minikd.nn import MLP
from minikd.report import Table, show
from minikd.report.config import from_toml
from minikd.report.folder import CONFIG
from minikd.settings import Settings
from minikd.teachers import as_teacher

STUDENT, TEACHER = "student.safetensors", "teacher.safetensors"
EXPORT_EXAMPLE = """\
examples:
  minikd export runs/mine --to c --out device/
  minikd export runs/mine --to c --quantize int8 --finetune --out device/
  minikd export runs/mine --to onnx --out student.onnx
  minikd export student.safetensors --to onnx --quantize int8 --data digits"""
SIZE_EXAMPLE = """\
examples:
  minikd size runs/mine
  minikd size student.safetensors"""
CALIBRATION_ROWS = 2000  # of the training part; more of them change no range that matters


class Source(NamedTuple):
    """What is exported: the student, the data that it was trained on if that is known, and the run's folder."""

    model: MLP
    data: Dataset | None
    folder: Path | None
    settings: Settings


class Exported(NamedTuple):
    """What stands in the file: the network in float32 or int8, and the model that it was made from."""

    model: MLP
    quantised: Quantised | None

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Of raw features, as the file should give them."""
        return (self.quantised or self.model).logits(x)


# --- what is there ---


def find(run: str, data: str, label_column: str) -> Source:
    """The student of a run's folder with the run's data, or that of a file with the data that was named.

    Raises
    ------
    DataError : there is no student.  ModelFormatError : its file is damaged.
    """
    path = Path(run)
    folder = path if path.is_dir() else None
    file = path / STUDENT if folder else path
    if not file.is_file():
        expected = f"a run's folder with {STUDENT} in it, or a model's file"
        got = "one without" if folder else "nothing of this name"
        raise DataError("minikd export", run, expected=expected, got=got, fix="minikd distill --out FOLDER makes one.")
    given = from_toml(folder / CONFIG) if folder and (folder / CONFIG).is_file() else {}
    given.pop("out", None)
    settings = Settings(**given)
    known = data or (settings.data if folder else "")
    found = None
    if known:
        column = label_column or settings.label_column
        found = load(known, split_seed=settings.split_seed, label_column=column)
    return Source(load_model(file), found, folder, settings)


def data_of(source: Source, what: str) -> Dataset:
    """The data, which is needed for this."""
    if source.data is None:
        fix = "Name it with --data, or give the run's folder."
        raise ArgumentError("minikd export", "--data", expected=f"there for {what}", got="nothing", fix=fix)
    return source.data


def calibration_rows(data: Dataset) -> np.ndarray:
    """Raw features to take the ranges from: rows spread over the training part."""
    step = max(1, len(data.x_train) // CALIBRATION_ROWS)
    return data.raw(data.x_train[::step])


def teacher_logits(source: Source, data: Dataset, allow_pickle: bool) -> np.ndarray | None:
    """What the run's teacher says of the training part; None if it was not kept."""
    named = source.settings.teacher
    if source.folder is not None and (source.folder / TEACHER).is_file():
        teacher = as_teacher(source.folder / TEACHER)
    elif isinstance(named, str) and Path(named).exists():
        teacher = as_teacher(named, class_names=data.class_names, allow_pickle=allow_pickle)
    else:
        return None
    return teacher.logits(None if teacher.per_row else data.raw(data.x_train), data.rows_train)


def prepared(options: argparse.Namespace, source: Source) -> Exported:
    """The network as it is to be written: in float32, or in int8, perhaps trained on for that."""
    if options.quantize == "none":
        if options.finetune:
            fix = "Add --quantize int8."
            raise ArgumentError("minikd export", "--finetune", expected="used with int8", got="float32", fix=fix)
        return Exported(source.model, None)
    data = data_of(source, "the ranges of int8")
    if not options.finetune:
        network = Network.of(source.model)
        return Exported(source.model, quantise(network, calibration_rows(data), calibration=options.calibration))
    soft = teacher_logits(source, data, options.allow_pickle)
    if soft is None:
        print("The run's teacher is not there: the student is trained on its labels alone.", file=sys.stderr)
    s = source.settings
    weights = {"temperature": s.temperature, "hard_weight": s.hard_weight, "soft_weight": s.soft_weight}
    given = {"objective": s.make_objective()} if s.objective or s.preset else weights
    tuned = finetune(
        source.model,
        data.x_train,
        data.y_train,
        soft,
        calibration=options.calibration,
        on_scale=True,
        epochs=options.epochs,
        batch_size=s.batch_size,
        **(given if soft is not None else {}),
    )
    return Exported(tuned.model, tuned.quantised)


# --- the forms ---


class Form(NamedTuple):
    """A form of export: what its name means, where it goes by default, how it is written and how it is checked.

    write : (options, what is exported, path) → the files.
    check : (options, what is exported, path, raw rows, labels) → rows of a table, or why nothing was checked.
    """

    summary: str
    default: str
    write: Callable[[argparse.Namespace, Exported, Path], list[Path]]
    check: Callable[[argparse.Namespace, Exported, Path, np.ndarray, np.ndarray], list[tuple[str, str]]]


def _write_c(options: argparse.Namespace, exported: Exported, path: Path) -> list[Path]:
    return list(to_c(Network.of(exported.model), path, name=options.name, quantised=exported.quantised))


def _check_c(
    options: argparse.Namespace, exported: Exported, path: Path, x: np.ndarray, y: np.ndarray
) -> list[tuple[str, str]]:
    if compiler() is None:
        return [("not checked", "there is no C compiler here to build the files with")]
    # With float32 the model is its own truth; int8 is measured against the float32 that it was made from.
    found = verify(path, exported.model, x, y, name=options.name, quantised=exported.quantised)
    bits = "the same bits as" if found.same_bits else "NOT THE BITS OF"
    return [
        ("compiled", f"{found.compiler}: {found.rows:,} rows give {bits} the NumPy reference"),
        ("logits", f"at most {found.largest_error:.3g} from those of float32"),
        ("size", f"{found.object_bytes:,} bytes of code and constants"),
        ("time", f"{found.nanoseconds:,.0f} ns a prediction on this machine"),
    ]


def _write_onnx(options: argparse.Namespace, exported: Exported, path: Path) -> list[Path]:
    to_onnx(exported.quantised or exported.model, path, opset=options.opset)
    return [path]


def _check_onnx(
    options: argparse.Namespace, exported: Exported, path: Path, x: np.ndarray, y: np.ndarray
) -> list[tuple[str, str]]:
    unit = "steps of int8" if exported.quantised else "of the largest logit"
    differences = check_onnx(path, exported.quantised or exported.model, x)
    return [(f"by {name}", f"logits at most {value:.2g} {unit} apart") for name, value in differences.items()]


def _write_safetensors(options: argparse.Namespace, exported: Exported, path: Path) -> list[Path]:
    if exported.quantised is not None:
        fix = "Export int8 to c or onnx."
        raise ArgumentError("minikd export", "--quantize", expected="none for safetensors", got="int8", fix=fix)
    save(path, exported.model)
    return [path]


def _check_safetensors(
    options: argparse.Namespace, exported: Exported, path: Path, x: np.ndarray, y: np.ndarray
) -> list[tuple[str, str]]:
    same = np.array_equal(load_model(path).logits(x), exported.model.logits(x))
    return [("read again", "the same bits" if same else "other logits")]


FORMS = {
    "c": Form("C99 without any library, and examples of its use", "{name}-c", _write_c, _check_c),
    "onnx": Form(
        "one file: raw features in, logits, probabilities, label out", "{name}.onnx", _write_onnx, _check_onnx
    ),
    "safetensors": Form(
        "minikd's own file, which minikd.runtime and libminikd read",
        "{name}-exported.safetensors",
        _write_safetensors,
        _check_safetensors,
    ),
}


# --- minikd export ---


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minikd export`."""
    parser.usage = "minikd export RUN --to FORM [options]"
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, or a model's file")
    forms = "; ".join(f"{name}: {form.summary}" for name, form in FORMS.items())
    add("--to", choices=tuple(FORMS), required=True, help=forms)
    add("--out", metavar="PATH", default="", help="a folder for c, else a file (default: beside the run, by its form)")
    add("--quantize", choices=("none", "int8"), default="none", help="numbers in float32 or in int8 (default: none)")
    add("--finetune", action="store_true", help="train on with int8's roundings in the loop, against the teacher")
    add("--epochs", metavar="N", type=int, default=EPOCHS, help=f"of --finetune (default: {EPOCHS})")
    add("--calibration", choices=tuple(CALIBRATIONS), default="best", help="of int8's ranges (default: best)")
    add("--opset", type=int, choices=tuple(OPSETS), default=min(OPSETS), help="of ONNX (default: 13)")
    add("--name", metavar="TEXT", default="student", help="of files and functions in C (default: student)")
    add("--data", metavar="DATA", default="", help="to calibrate and to verify with (default: the run's)")
    add("--label-column", metavar="TEXT", default="", help="of a CSV file")
    add("--allow-pickle", action="store_true", help="read a pickled teacher, which runs its code")
    verified = parser.add_mutually_exclusive_group()
    words = "run the validation rows through the files (the default where the data and a compiler are there)"
    verified.add_argument("--verify", action="store_true", default=None, help=words)
    verified.add_argument("--no-verify", dest="verify", action="store_false", help="write the files only")


def export(options: argparse.Namespace) -> int:
    """Write the files and say what they are, how large, and how well they agree; returns the exit code."""
    source = find(options.run, options.data, options.label_column)
    if options.verify:
        data_of(source, "verifying")
    exported = prepared(options, source)
    form = FORMS[options.to]
    beside = source.folder or Path(options.run).parent
    path = Path(options.out) if options.out else beside / form.default.format(name=options.name)
    files = form.write(options, exported, path)
    rows: list[tuple[str, ...]] = [(str(file), f"{file.stat().st_size:,} bytes") for file in files]
    show(Table(("", ""), "<>", rows), sys.stdout)
    facts = _about(exported)
    if options.verify is not False and source.data is not None:
        data = source.data
        x, y = data.raw(data.x_validation), data.y_validation
        facts += [("accuracy", _accuracies(source, exported, x, y))]
        facts += form.check(options, exported, path, x, y)
    elif options.verify is not False:
        facts += [("not verified", "there is no data: name it with --data")]
    print()
    show(Table(("", ""), "<<", facts), sys.stdout)
    if options.to == "c":
        where, name = shlex.quote(str(path)), options.name
        print(f"\nBuild the example: cd {where} && cc -std=c99 -O2 main.c {name}.c -o {name}")
    return 0


def _about(exported: Exported) -> list[tuple[str, str]]:
    sizes_of = "-".join(map(str, Network.of(exported.model).sizes))
    rows = [("network", f"{sizes_of}, {'int8' if exported.quantised else 'float32'}")]
    if exported.quantised is not None:
        q = exported.quantised
        rows.append(("calibration", f"{q.calibration}: KL(float32 ‖ int8) is {q.divergence:.2g}"))
        rows.append(("input", f"int8 of (x - mean) / deviation: scale {q.input.scale:.6g}, zero point {q.input.zero}"))
    return rows


def _accuracies(source: Source, exported: Exported, x: np.ndarray, y: np.ndarray) -> str:
    before, after = source.model.logits(x), exported.logits(x)
    lost = metrics.accuracy(before, y) - metrics.accuracy(after, y)
    text = f"{100 * metrics.accuracy(after, y):.2f} % on {len(x):,} validation rows"
    if exported.quantised is None:
        return text
    return (
        f"{text}, {100 * lost:+.2f} points lost; agrees with float32 on {100 * metrics.agreement(after, before):.2f} %"
    )


# --- minikd size ---


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minikd size`."""
    parser.usage = "minikd size RUN"
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a model's file")


# Figures of `sizes` that are bytes, in words.
SIZES = {
    "constant_bytes": "weights and other constants",
    "code_bytes": "code, an estimate for -Os",
    "flash_bytes": "flash, both together",
    "ram_bytes": "RAM that is kept between calls",
    "stack_bytes": "stack in a call, at most",
}


def size(options: argparse.Namespace) -> int:
    """Print what the student takes of a device, in float32 and in int8; returns the exit code."""
    network = Network.of(find(options.run, "", "").model)
    # The ranges of int8 do not change a size, so any rows will do.
    rows = np.random.default_rng(0).normal(size=(64, network.sizes[0])) * network.deviation + network.mean
    forms = {"float32": sizes(network)}
    try:
        forms["int8"] = sizes(network, quantise(network, rows, calibration="min-max"))
    except ArgumentError as error:
        print(f"Not in int8: {error}\n")
    table = [(words, *(f"{form[key]:,}" for form in forms.values())) for key, words in SIZES.items()]
    layers = "-".join(map(str, network.sizes))
    print(f"{layers}: {network.multiply_adds:,} multiply-accumulates for one prediction\n")
    show(Table(("bytes", *forms), "<" + ">" * len(forms), table), sys.stdout)
    return 0
