"""What an exported student costs on small processors, and whether its bits are the reference's there.

Each is compiled for every target and, where the target is emulated, run on rows of features: without a board.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minikd.export.emulator import Device
from minikd.export.targets import Target, compile_object, cross_compile

__all__ = ["measure"]


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
    BackendError : Zig or Unicorn is missing, the C does not compile, or it leaves its memory.
    """
    if target.processor is None:
        objects = [compile_object(source, target, level=level) for source in sources]
        flash, static = sum(o.flash_bytes for o in objects), sum(o.static_bytes for o in objects)
        return _row(target, flash, static)
    device = Device(cross_compile(sources, target, [function], level=level), target)
    equal, answers = True, []
    for row, wanted in zip(rows, expected, strict=True):
        result = np.zeros_like(wanted)
        answers.append(device.call(function, row, row.size, result, result.size))
        equal &= answers[-1].value == 0 and result.tobytes() == wanted.tobytes()
    return _row(
        target,
        device.program.flash_bytes,
        device.program.static_bytes,
        stack_bytes=max(answer.stack_bytes for answer in answers),
        instructions=max(answer.instructions for answer in answers),
        bits_equal=equal,
    )


def _row(target: Target, flash: int, static: int, **ran: int | bool) -> dict[str, Any]:
    nothing = {"stack_bytes": None, "instructions": None, "bits_equal": None}
    return {"target": target.name, "flash_bytes": flash, "static_bytes": static, **nothing, **ran}
