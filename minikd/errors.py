"""The errors minikd raises, and the one way their messages are built.

Every message answers the same five questions in the same order: which operation, which argument,
what was expected, what came, and how to mend it.
"""

from __future__ import annotations


class MinikdError(Exception):
    """Base of every error that minikd raises on purpose.

    Parameters
    ----------
    where : what was being done, usually the public name of a function ("softmax", "minikd distill").
    argument : the argument, file or option at fault.
    expected : what would have been accepted, completing "<argument> must be …".
    got : what came instead, completing "got …".
    fix : one sentence that says how to mend it.
    """

    def __init__(self, where: str, argument: str, *, expected: str, got: str, fix: str = "") -> None:
        self.where, self.argument, self.expected, self.got, self.fix = where, argument, expected, got, fix
        super().__init__(f"{where}: {argument} must be {expected}, got {got}." + (f" {fix}" if fix else ""))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.where, self.argument, self.expected, self.got, self.fix)


def _rebuild(kind: type[MinikdError], where: str, argument: str, expected: str, got: str, fix: str) -> MinikdError:
    return kind(where, argument, expected=expected, got=got, fix=fix)


class ArgumentError(MinikdError, ValueError):
    """A value is outside what its argument allows (a temperature of 0, a label of 12 with 10 classes)."""


class ShapeError(MinikdError, ValueError):
    """An array has the wrong shape, or no rows or no classes at all."""


class DTypeError(MinikdError, TypeError):
    """An array has a dtype that minikd does not compute with (complex, object, strings)."""


class TapeError(MinikdError, RuntimeError):
    """Gradients were asked for in a way the tape cannot answer (twice, or after an in-place change)."""


class DivergenceError(MinikdError, ArithmeticError):
    """A training has left the finite numbers: a loss or a weight is NaN or infinite."""


class PlanError(MinikdError, RuntimeError):
    """A step cannot be replayed as it was recorded: something besides operations decides what it computes."""


class BackendError(MinikdError, RuntimeError):
    """A backend is unknown or cannot run here."""


class DataError(MinikdError, ValueError):
    """A data set, or a file of one, cannot be read as it stands."""


class ModelFormatError(MinikdError, ValueError):
    """A model file is damaged, foreign, or describes no model that minikd can build."""


class OutputError(MinikdError, OSError):
    """A result cannot be written where it was asked to go."""


def label_out_of_range(where: str, row: int, label: int, classes: int) -> ArgumentError:
    """The one error for a bad hard label, raised alike by every backend."""
    return ArgumentError(
        where,
        f"target[{row}]",
        expected=f"a class id from 0 to {classes - 1} (there are {classes} classes), or ignore_index",
        got=str(label),
        fix="Renumber the labels from 0, or mark rows without a label with ignore_index.",
    )


def bad_temperature(where: str, value: object, argument: str = "temperature") -> ArgumentError:
    """The one error for a temperature that is not a finite number above 0."""
    return ArgumentError(
        where,
        argument,
        expected="a finite number above 0",
        got=repr(value),
        fix="Temperatures from 1 to 20 are usual; 1 leaves the logits as they are.",
    )
