"""The one table of operations: name, formula, signature, reference forward and vjp, sample inputs.

`OPS` maps each name to its `Op`. To add an operation, register one in the module of its subject; it is then
differentiated, tested on every backend and documented, because all of these walk the table.
"""

from minikd.ops import (
    divergences,
    elementwise,
    linear,
    linear_losses,
    losses,
    pictures,
    predictions,
    random,
    reductions,
    rows,
    shapes,
    teacher,
    updates,
)
from minikd.ops.op import OPS, Argument, Op, Shape

__all__ = ["OPS", "Argument", "Op", "Shape"]

_SUBJECTS = (
    *(elementwise, shapes, reductions, linear, rows, losses, divergences, linear_losses, predictions, teacher),
    *(random, pictures, updates),
)
