"""What an exported student costs on small processors, and whether its bits are the reference's there.

Each is compiled for every target and, where the target is emulated, run on rows of features: without a board.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import ShapeError
from minikd.export.c import to_c
from minikd.export.emulator import Device
from minikd.export.network import Network
from minikd.export.quantise import Quantised
from minikd.export.reference import predict_c_order
from minikd.export.size import sizes
from minikd.export.targets import TARGETS, Target, compile_object, cross_compile

__all__ = ["device_table", "measure"]


class Form(NamedTuple):
    """A function of exported C: its source, its name, what goes in and must come out, and the bytes of its tables."""

    name: str
    source: Path
    function: str
    rows: np.ndarray
    expected: np.ndarray
    constants: int


def device_table(
    folder: Path,
    network: Network,
    quantised: Quantised | None,
    rows: np.ndarray,
    *,
    targets: Sequence[Target] = TARGETS,
    level: str = "-O2",
) -> list[dict[str, Any]]:
    """The student in C on every target: a row of `measure` for each form and target, with the form's name.

    Forms are "float32", "int8" from raw features to logits, and "int8 alone" from int8 features to int8 logits, where
    no float is touched. A row whose constants do not go into the target's flash has None for all figures.

    Parameters
    ----------
    folder : where the C is written, in folders of its own for float32 and int8.
    network, quantised : the student; without the latter there is no int8.
    rows : (r, k) raw features to predict, a few: software floats take a second for some ten million instructions.
    level : how far the compiler optimises, "-O2" or "-Os".

    Raises
    ------
    ShapeError : there are no rows, or rows of another length.
    BackendError : Zig or Unicorn is missing, or the C does not compile.  OutputError : the folder cannot be written.
    """
    table = []
    for form in _forms(folder, network, quantised, np.asarray(rows, np.float32)):
        for target in targets:
            name = {"form": form.name}
            if form.constants > target.room:
                table.append(name | _row(target))
            else:
                table.append(
                    name | measure([form.source], target, form.function, form.rows, form.expected, level=level)
                )
    return table


def _forms(folder: Path, network: Network, quantised: Quantised | None, rows: np.ndarray) -> list[Form]:
    source = _written(to_c(network, folder / "float32"))
    constants = sizes(network)["constant_bytes"]
    forms = [Form("float32", source, "student_predict", rows, predict_c_order(network, rows), constants)]
    if quantised is not None:
        source, q = _written(to_c(network, folder / "int8", quantised=quantised)), quantised.quantise_input(rows)
        constants = sizes(network, quantised)["constant_bytes"]
        forms += [
            Form("int8", source, "student_predict", rows, quantised.logits(rows), constants),
            Form("int8 alone", source, "student_predict_q", q, quantised.integers(q), constants),
        ]
    return forms


def _written(paths: Sequence[Path]) -> Path:
    return next(path for path in paths if path.name == "student.c")


def measure(
    sources: Sequence[Path],
    target: Target,
    function: str,
    rows: np.ndarray,
    expected: np.ndarray,
    *,
    level: str = "-O2",
) -> dict[str, Any]:
    """What one C function costs on one target, which predicts rows one at a time.

    Parameters
    ----------
    sources : C files that hold it, and all that it calls.
    function : int function(const x *row, size_t n, y *result, size_t m), which returns 0.
    rows, expected : (r, n) and (r, m), of the C types' dtypes: what goes in and what must come out.
    level : how far the compiler optimises, "-O2" or "-Os".

    Returns
    -------
    target : its name.
    flash_bytes : code and constants with the compiler's helpers that they call, or, where nothing is emulated, those
        of the objects alone.
    static_bytes, stack_bytes : memory, all the time and while it runs.
    instructions : of the slowest row.
    bits_equal : whether every row's result has every bit of `expected`.
    The last three are None where nothing is emulated.

    Raises
    ------
    ShapeError : there are no rows.
    BackendError : Zig or Unicorn is missing, the C does not compile, or it leaves its memory.
    """
    if not len(rows):
        raise ShapeError("measure", "rows", expected="a row of features at least", got="none")
    if target.processor is None:
        objects = [compile_object(source, target, level=level) for source in sources]
        flash, static = sum(o.flash_bytes for o in objects), sum(o.static_bytes for o in objects)
        return _row(target, flash_bytes=flash, static_bytes=static)
    device = Device(cross_compile(sources, target, [function], level=level), target)
    equal, answers = True, []
    for row, wanted in zip(rows, expected, strict=True):
        result = np.zeros_like(wanted)
        answers.append(device.call(function, row, row.size, result, result.size))
        equal &= answers[-1].value == 0 and result.tobytes() == wanted.tobytes()
    return _row(
        target,
        flash_bytes=device.program.flash_bytes,
        static_bytes=device.program.static_bytes,
        stack_bytes=max(answer.stack_bytes for answer in answers),
        instructions=max(answer.instructions for answer in answers),
        bits_equal=equal,
    )


def _row(target: Target, **figures: int | bool) -> dict[str, Any]:
    names = ("flash_bytes", "static_bytes", "stack_bytes", "instructions", "bits_equal")
    return {"target": target.name, **dict.fromkeys(names), **figures}
