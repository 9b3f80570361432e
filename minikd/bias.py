"""Biases that give each class its frequency back, after a student was taught by rows that lacked some classes.

A student that never sees a class learns that it is rare, and seldom names it, although soft labels have taught it
what the class looks like. Then one number a class is wrong, and it can be put right without any label: the biases of
the last layer are raised until the mean predicted probability of each class is its known frequency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import ArgumentError, ShapeError, bad_temperature
from minikd.kernels import as_index, as_real
from minikd.kernels.arrays import host_copy, to_host
from minikd.nn import Linear, Module
from minikd.tape import no_grad

__all__ = ["correct_bias", "matching_bias"]

WHERE = "correct_bias"
SUM_TOLERANCE = 1e-4  # how far the sum of frequencies may be from 1; they are divided by it
ROWS_TO_TRY = 32  # rows on which a changed bias must show as it should
RIDGE = 1e-12  # keeps a Newton step finite where no row is undecided between two classes
EASY_SPREAD = 8.0  # scores of a row that are no farther apart need no easier problem before them
PARTS = tuple(0.5**k for k in range(1, 12))  # of a Newton step, which are tried in turn
ROUGH, ROUGH_STEPS = 1e-4, 20  # for the easier problems, whose solutions are only beginnings


def correct_bias(
    model: Module,
    x: Any,
    frequencies: Any,
    *,
    classes: Sequence[int] | None = None,
    temperature: float = 1.0,
    normalised: bool = False,
    tolerance: float = 1e-7,
    max_steps: int = 100,
) -> np.ndarray:
    """Add to the last layer's biases, in place, what makes the mean predicted probabilities these frequencies.

        mean over rows of softmax((z + b) / T)_k = f_k

    Parameters
    ----------
    model : its scores are the output of a Linear with a bias, the last one that it has.
    x : (n, k) raw features of rows in which the classes have these frequencies. They need no labels, and labels of a
        test part have no place here: what they would choose could not be judged by them any more.
    frequencies : (c,) positive, with the sum 1: the known share of each class, or the mean of what a teacher says of
        these rows, ``teacher.predict_proba(x).mean(axis=0)``.
    classes : ids of the classes whose biases may move; None for all. The others keep theirs exactly, and match as a
        group only.
    temperature : of the softmax. 1 means the probabilities of `predict_proba`; towards 0 (say 0.01) it is how often
        each class is named.
    normalised : says that x is on the network's own scale already.
    tolerance, max_steps : see `matching_bias`.

    Returns
    -------
    b : (c,) float64, what was added. It is 0 in classes that may not move; if all may, its mean is 0, since a number
        added to all scores changes nothing. The model's biases have its own dtype, so that in float32 frequencies
        match to about 1e-6.

    Raises
    ------
    ArgumentError : the model's scores do not end in a bias, a frequency is not above 0, they do not sum to 1, a class
        does not exist, or there is no such b in reach. The model is then as it was.
    ShapeError : there is not one frequency for each class.

    Source: Hinton, Vinyals and Dean 2015, sec. 3, who raise the bias of an omitted class by what is best for the test
    set; here the frequency of the class decides instead.
    """
    layer = _last_linear(model)
    x = to_host(x)
    before = model.logits(x, normalised=normalised)
    if before.ndim != 2:
        raise ShapeError(WHERE, "x", expected="rows of features (n, k)", got=f"shape {np.shape(x)}")
    if before.shape[1] != layer.bias.shape[0]:
        raise _not_at_the_end(f"{before.shape[1]} scores, and a last Linear with {layer.bias.shape[0]}")
    limits: dict[str, Any] = {"tolerance": tolerance, "max_steps": max_steps}
    added = matching_bias(before, frequencies, classes=classes, temperature=temperature, **limits)
    old = host_copy(layer.bias.array)
    _set(layer, old + added)
    piece = slice(ROWS_TO_TRY)
    after = model.logits(np.asarray(x)[piece], normalised=normalised).astype(np.float64)
    size = 1 + np.abs(before[piece]).max() + np.abs(added).max()
    if not np.allclose(after - before[piece], added, rtol=0, atol=1e-4 * size):
        _set(layer, old)
        raise _not_at_the_end("scores that do not follow the bias of its last Linear")
    return added


def matching_bias(
    logits: Any,
    frequencies: Any,
    *,
    classes: Sequence[int] | None = None,
    temperature: float = 1.0,
    tolerance: float = 1e-7,
    max_steps: int = 100,
) -> np.ndarray:
    """The b of `correct_bias`, from logits (n, c) alone: mean of softmax((z + b) / T)_k over the rows = f_k.

    It minimises the convex mean of T·log Σ exp((z + b) / T) - f·b, whose gradient is mean p - f, by Newton's method.
    Where a Newton step does not halve Σ |mean p - f|, a part of it may do, or a step of another kind, which never
    leads away: a round of Sinkhorn's scaling of exp(z / T),

        b_k += T·(log f_k - log mean p_k)

    Parameters
    ----------
    logits : (n, c), finite.
    frequencies, classes, temperature : as for `correct_bias`.
    tolerance : the largest |mean p_k - f_k| that is left.
    max_steps : of either kind; fewer than ten are usual.

    Returns
    -------
    b : (c,) float64; 0 in classes that may not move, or of mean 0 if all may.

    Source: Sinkhorn 1967, "Diagonal equivalence to matrices with prescribed row and column sums".
    """
    if not isinstance(temperature, int | float | np.number) or not 0 < temperature < np.inf:
        raise bad_temperature(WHERE, temperature)
    if not tolerance > 0:
        raise ArgumentError(WHERE, "tolerance", expected="above 0", got=repr(tolerance))
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused below
        scores = as_real(WHERE, "logits", logits).astype(np.float64) / float(temperature)
    if scores.ndim != 2 or 0 in scores.shape:
        expected = "of shape (n, c) with n, c ≥ 1"
        raise ShapeError(WHERE, "logits", expected=expected, got=f"shape {scores.shape}")
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise ArgumentError(WHERE, "logits", expected="finite", got=f"{scores[row]} in row {row}")
    wanted = _checked_frequencies(frequencies, scores.shape[1])
    moving = _checked_classes(classes, wanted)
    bias = np.zeros(scores.shape[1])
    if len(moving) == scores.shape[1]:
        bias[:] = _solve(scores, wanted, tolerance, max_steps)
        return float(temperature) * (bias - bias.mean())
    # The classes that stay are one class to the others: the sum of their probabilities is what must come out.
    staying = np.setdiff1d(np.arange(len(wanted)), moving)
    together = np.logaddexp.reduce(scores[:, staying], axis=1)
    found = _solve(
        np.column_stack([scores[:, moving], together]),
        np.append(wanted[moving], wanted[staying].sum()),
        tolerance,
        max_steps,
    )
    bias[moving] = found[:-1] - found[-1]
    return float(temperature) * bias


# --- the equation ---


def _solve(scores: np.ndarray, wanted: np.ndarray, tolerance: float, max_steps: int) -> np.ndarray:
    """b (c,), up to a constant, with mean softmax(scores + b) = wanted; scores are (n, c), wanted sums to 1.

    Scores far apart are brought closer first, by a temperature that is halved until it is 1: each solution lies near
    the next, and steps from afar would be many where rows are certain.
    """
    bias, left = _steps(scores, np.zeros(scores.shape[1]), wanted, tolerance, 0)
    if left <= tolerance:
        return bias
    spread = float(np.ptp(scores, axis=1).max())
    for halvings in range(max(0, math.ceil(math.log2(max(spread, 1.0) / EASY_SPREAD))), 0, -1):
        scale = 2.0**halvings
        bias = scale * _steps(scores / scale, bias / scale, wanted, ROUGH, ROUGH_STEPS)[0]
    bias, left = _steps(scores, bias, wanted, tolerance, max_steps)
    if left <= tolerance:
        return bias
    raise ArgumentError(
        WHERE,
        "max_steps",
        expected=f"enough to bring all frequencies within {tolerance:g}",
        got=f"{max_steps}, after which one is off by {left:.2g}",
        fix="Where rows are so certain, the frequencies can only be met at a higher temperature.",
    )


def _steps(
    scores: np.ndarray, bias: np.ndarray, wanted: np.ndarray, tolerance: float, max_steps: int
) -> tuple[np.ndarray, float]:
    """The bias after at most so many steps, fewer if it is within the tolerance; and what the worst class is off."""
    here = _at(scores, bias, wanted)
    for _ in range(max_steps):
        if np.abs(here.missing).max() <= tolerance:
            break
        here = _next(scores, here, wanted)
    return here.bias, float(np.abs(here.missing).max())


class _Place(NamedTuple):
    """A bias (c,), with log softmax (n, c), the logarithm (c,) of its mean, and what that mean lacks (c,)."""

    bias: np.ndarray
    log_p: np.ndarray
    log_mean: np.ndarray
    missing: np.ndarray

    @property
    def distance(self) -> float:
        """Σ |mean p - f|."""
        return float(np.abs(self.missing).sum())


def _at(scores: np.ndarray, bias: np.ndarray, wanted: np.ndarray) -> _Place:
    log_p, log_mean = _log_probabilities(scores + bias)
    return _Place(bias, log_p, log_mean, wanted - np.exp(log_mean))


def _next(scores: np.ndarray, here: _Place, wanted: np.ndarray) -> _Place:
    """One step on: a whole Newton step if it halves the distance, else the better one of a part of it and a round."""
    newton = _newton_step(np.exp(here.log_p), here.missing)
    there = _at(scores, here.bias + newton, wanted)
    if there.distance <= here.distance / 2:
        return there
    best = _at(scores, here.bias + np.log(wanted) - here.log_mean, wanted)
    for part in PARTS:
        there = _at(scores, here.bias + part * newton, wanted)
        if there.distance <= (1 - part / 2) * here.distance:
            return min(best, there, key=lambda place: place.distance)
    return best


def _log_probabilities(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log softmax of the rows (n, c), and the logarithm (c,) of its mean over them, where nothing underflows."""
    log_p = scores - scores.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    largest = log_p.max(axis=0)
    return log_p, largest + np.log(np.exp(log_p - largest).mean(axis=0))


def _newton_step(p: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """H⁻¹·missing with H = diag(mean p) - mean p pᵀ, of the steps whose sum is 0; H is 0 along the others."""
    classes = p.shape[1]
    hessian = np.diag(p.mean(axis=0)) - p.T @ p / len(p)
    found: np.ndarray = np.linalg.solve(hessian + 1 / classes + RIDGE * np.eye(classes), missing)
    return found - found.mean()


# --- what is refused ---


def _checked_frequencies(frequencies: Any, classes: int) -> np.ndarray:
    wanted = as_real(WHERE, "frequencies", frequencies).astype(np.float64)
    if wanted.shape != (classes,):
        fix = "Of a teacher's probabilities (n, c), take the mean over the rows."
        raise ShapeError(WHERE, "frequencies", expected=f"of shape ({classes},)", got=f"shape {wanted.shape}", fix=fix)
    if not (wanted >= 0).all() or not abs(wanted.sum() - 1) <= SUM_TOLERANCE:
        got, fix = f"{wanted} with the sum {wanted.sum():g}", "Divide counts by their sum."
        raise ArgumentError(WHERE, "frequencies", expected="from 0, with the sum 1", got=got, fix=fix)
    total: float = wanted.sum()
    return wanted / total


def _checked_classes(classes: Sequence[int] | None, wanted: np.ndarray) -> np.ndarray:
    """The ids of the classes that move, in order; what they ask for must be reached by a finite bias."""
    count = len(wanted)
    moving = np.arange(count) if classes is None else np.sort(as_index(WHERE, "classes", classes))
    if moving.ndim != 1 or not len(moving) or moving[0] < 0 or moving[-1] >= count or (np.diff(moving) == 0).any():
        expected = f"different class ids from 0 to {count - 1}"
        raise ArgumentError(WHERE, "classes", expected=expected, got=repr(classes))
    if (wanted[moving] == 0).any():
        k = int(moving[wanted[moving] == 0][0])
        fix = "No finite bias makes a class impossible; leave it out of `classes`."
        raise ArgumentError(WHERE, f"frequencies[{k}]", expected="above 0", got="0", fix=fix)
    if len(moving) < count and np.delete(wanted, moving).sum() == 0:
        fix = "Something must be left for the classes whose biases stay, which are never impossible."
        raise ArgumentError(
            WHERE, "frequencies", expected="of a sum below 1 in the classes that move", got="a sum of 1", fix=fix
        )
    return moving


def _last_linear(model: Any) -> Any:
    """The last Linear of a model, which must have a bias."""
    if not isinstance(model, Module):
        fix = "Of another model's scores, matching_bias finds what to add to them."
        raise ArgumentError(WHERE, "model", expected="a Module of minikd.nn", got=type(model).__name__, fix=fix)
    layers = [part for _, part in model.named_modules() if isinstance(part, Linear)]
    if not layers:
        raise _not_at_the_end("a model without any Linear")
    if layers[-1].bias is None:
        raise _not_at_the_end("a last Linear without a bias")
    return layers[-1]


def _not_at_the_end(got: str) -> ArgumentError:
    expected, fix = "a model whose scores are those of a Linear with a bias", "Give it one as its last layer."
    return ArgumentError(WHERE, "model", expected=expected, got=got, fix=fix)


def _set(layer: Any, bias: np.ndarray) -> None:
    with no_grad():
        layer.bias[...] = bias
