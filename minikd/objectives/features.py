"""Terms that compare what layers inside the student and the teacher put out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, ShapeError
from minikd.nn import Linear
from minikd.objectives.objective import Batch, Term
from minikd.tensor import Tensor

__all__ = ["Attention", "Hints", "Layered"]

Pair = tuple[str, str]


@dataclass(eq=False, kw_only=True)
class Layered(Term):
    """A term that compares pairs of layers, and adds up what it finds.

    Parameters
    ----------
    weight : of the term.
    pairs : (student's layer, teacher's layer), one pair or several, by their names in `Module.named_modules`: in an
        MLP with one hidden layer "0" is the first Linear, "1" its activation and "2" the logits.
    """

    pairs: tuple[Pair, ...] = (("1", "1"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs: Any = self.pairs
        if _is_pair(pairs):
            pairs = (pairs,)
        fits = isinstance(pairs, tuple | list) and len(pairs) > 0 and all(map(_is_pair, pairs))
        self.check("pairs", 'pairs of layers such as (("1", "1"), ("3", "5"))', fits)
        self.pairs = tuple((str(ours), str(theirs)) for ours, theirs in pairs)

    @property
    def student_layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(ours for ours, _ in self.pairs))

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(theirs for _, theirs in self.pairs))

    def compared(self, pair: Pair, student: Tensor, teacher: Tensor) -> Tensor:
        """One pair's part of the value, from the outputs (n, k) and (n, m) of its layers."""
        raise NotImplementedError

    def value(self, batch: Batch) -> Any:
        parts = [self.compared(p, batch.student_layer(p[0]), batch.teacher_layer(p[1])) for p in self.pairs]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def refuse_widths(self, pair: Pair, student: Tensor, teacher: Tensor, fix: str) -> None:
        """ShapeError unless both layers of the pair are equally wide."""
        if student.shape != teacher.shape:
            expected = f"pairs of equally wide layers, as {pair} is not"
            got = f"the student's of shape {student.shape} and the teacher's of shape {teacher.shape}"
            raise ShapeError(self.name, "pairs", expected=expected, got=got, fix=fix)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)


@dataclass(eq=False, kw_only=True)
class Hints(Layered):
    """Half the mean squared distance between a linear projection of the student's layer and the teacher's layer.

    The projection, a Linear from the student's width to the teacher's, is made by `prepare` and learns along with the
    student: give its `parameters()` to the optimizer.

    Parameters
    ----------
    weight, pairs : as in `Layered`.
    project : whether there is a projection; layers of equal width may do without.
    seed : of the projections' initial weights.
    """

    project: bool = True
    seed: int = 0
    projections: dict[Pair, Linear] = dataclasses.field(init=False, repr=False, default_factory=dict)

    formula = "Σ_pairs 1/2·mean (h_s·wᵀ + b - h_t)²"
    source = "Romero et al. 2015, eq. 3 (FitNets), with the mean over rows and units"

    def prepare(self, batch: Batch) -> None:
        """Make the projections that are not there yet, in the widths and the dtype of this batch's features."""
        rng = np.random.default_rng(self.seed)
        for pair in self.pairs if self.project else ():
            student, teacher = batch.student_layer(pair[0]), batch.teacher_layer(pair[1])
            sizes = student.shape[1], teacher.shape[1]
            made = Linear(*sizes, seed=rng, dtype=student.dtype)
            known = self.projections.setdefault(pair, made)
            if known.weight.shape != made.weight.shape:
                expected = f"features of the widths {known.weight.shape[::-1]} that it was prepared for"
                raise ShapeError(self.name, "batch", expected=expected, got=f"the widths {sizes} at {pair}")

    def parameters(self) -> list[Tensor]:
        return [p for projection in self.projections.values() for p in projection.parameters()]

    def compared(self, pair: Pair, student: Tensor, teacher: Tensor) -> Tensor:
        if self.project:
            student = self._projection(pair)(student)
        self.refuse_widths(pair, student, teacher, "Let project be True: a projection then learns to match them.")
        difference = student - teacher
        return (difference * difference).mean() * 0.5

    def _projection(self, pair: Pair) -> Linear:
        if pair not in self.projections:
            fix = "Call prepare(batch), and give its parameters() to the optimizer."
            got = "a call before there was a projection"
            raise ArgumentError(self.name, "the term", expected="prepared with a batch", got=got, fix=fix)
        return self.projections[pair]


SMALLEST_SQUARED_LENGTH = 1e-24  # rows shorter than 1e-12 count as that long, as PyTorch's normalize has it


@dataclass(eq=False, kw_only=True)
class Attention(Layered):
    """Mean squared distance between the layers' patterns of activity, each brought to length 1 in every row.

    What the paper does with the places of an image, each summed over its channels, is done with the units of a layer
    here; so the layers must be equally wide. How strongly a layer is active plays no part, only where.

    Parameters
    ----------
    weight, pairs : as in `Layered`.
    power : p ≥ 1; the larger, the more the strongest units count.
    """

    power: float = 2.0

    formula = "Σ_pairs mean (f(h_s) - f(h_t))²,  f(h) = |h|^p / ‖|h|^p‖₂"
    source = "Zagoruyko and Komodakis 2017, sec. 3.1, with the mean of its published code in place of eq. 2's norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("power", "a finite number from 1", 1 <= self.power < np.inf)

    def compared(self, pair: Pair, student: Tensor, teacher: Tensor) -> Tensor:
        self.refuse_widths(pair, student, teacher, "Compare other layers, or use Hints, which learns a projection.")
        difference = self.pattern(student) - self.pattern(teacher)
        return (difference * difference).mean()

    def pattern(self, x: Tensor) -> Tensor:
        """|x|^p, each row divided by its length."""
        activity = x * x if self.power == 2 else x.abs() ** float(self.power)
        squared_length = (activity * activity).sum(axis=1, keepdims=True)
        return activity * squared_length.maximum(SMALLEST_SQUARED_LENGTH) ** -0.5
