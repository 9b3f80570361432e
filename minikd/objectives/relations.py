"""Terms that compare how rows, or classes, stand to one another, and not the rows themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minikd import functional as F
from minikd.kernels import product_eps
from minikd.kernels.arrays import here
from minikd.kernels.recording import note_constant
from minikd.objectives.labels import Softened
from minikd.objectives.objective import Batch, Term, constant
from minikd.tensor import Tensor

__all__ = ["DIST", "RelationalAngle", "RelationalDistance"]

# --- correlations of the predictions ---

CORRELATION_EPS = 1e-8  # of the published code, added to the product of the two lengths
SMALLEST_SQUARE = (
    1e-30  # keeps the gradient of a length finite where it is 0; far below what CORRELATION_EPS lets count
)


@dataclass(eq=False, kw_only=True)
class DIST(Softened):
    """One minus the correlation with the teacher: of each row's probabilities, and of each class's over the batch.

    A student need not match the teacher's probabilities, only their linear order. Both means are multiplied by T², as
    in the published code. A row or a class whose probabilities are all the same has correlation 0, so a batch of one
    row teaches by its row alone.

    Parameters
    ----------
    weight, temperature, scale_t2 : as in `Softened`.
    inter : weight of the rows' part (inter-class relation; β in the paper).
    intra : weight of the classes' part (intra-class relation; γ in the paper).
    """

    inter: float = 1.0
    intra: float = 1.0
    temperature: float = 1.0

    formula = "T²·(inter·(1 - mean_rows ρ(q, p)) + intra·(1 - mean_classes ρ(q, p)))"
    source = "Huang et al. 2022 (DIST), with the factor T² and the 1e-8 of its published code"

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in ("inter", "intra"):
            self.check(part, "a finite number from 0", 0 <= getattr(self, part) < np.inf)

    def value(self, batch: Batch) -> Any:
        p = F.softmax(batch.student_logits, temperature=self.temperature)
        q = constant(F.softmax(batch.teacher_logits, temperature=self.temperature))
        rows, classes = _uncorrelated(p, q), _uncorrelated(p.T, q.T)
        return self.scaled(rows * float(self.inter) + classes * float(self.intra))


def _uncorrelated(a: Tensor, b: Tensor) -> Tensor:
    """1 - the mean over the rows of the correlation of a (n, m) with b (n, m)."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    lengths = [(x * x).sum(axis=1).maximum(SMALLEST_SQUARE) ** 0.5 for x in (a, b)]
    return 1.0 - ((a * b).sum(axis=1) / (lengths[0] * lengths[1] + CORRELATION_EPS)).mean()


# --- distances and angles between the rows of a batch ---

SMALLEST_SQUARED_DISTANCE = 1e-12  # of the published code
ROUNDING = 16  # squared distances below so many eps of their mean are rounding, and count as that much


@dataclass(eq=False, kw_only=True)
class Relational(Term):
    """A term of the relations between the rows of a batch.

    Parameters
    ----------
    weight : of the term; Tian et al. 2020 use 25 for distances and 50 for angles beside the hard labels.
    layers : the student's and the teacher's layer that are compared, by name; their widths may differ. None compares
        the logits.
    """

    layers: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            fits = isinstance(self.layers, tuple | list) and len(self.layers) == 2
            fits = fits and all(isinstance(name, str) for name in self.layers)
            self.check("layers", 'a pair of names such as ("1", "3"), or None for the logits', fits)
            self.layers = (self.layers[0], self.layers[1])

    @property
    def student_layers(self) -> tuple[str, ...]:
        return self.layers[:1] if self.layers else ()

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        return self.layers[1:] if self.layers else ()

    def relation(self, x: Tensor) -> Tensor:
        """What is compared: a number for each pair, or each three, of the rows of x (n, k)."""
        raise NotImplementedError

    def value(self, batch: Batch) -> Any:
        if self.layers is None:
            student, teacher = batch.student_logits, constant(batch.teacher_logits)
        else:
            student, teacher = batch.student_layer(self.layers[0]), batch.teacher_layer(self.layers[1])
        if student.shape[0] == 1:
            return (student - student).sum()  # one row has no relations
        return _huber(self.relation(student) - self.relation(teacher)).mean()


@dataclass(eq=False, kw_only=True)
class RelationalDistance(Relational):
    """Distances between the rows of a batch, in units of their mean; time and memory grow as n²."""

    formula = "1/n²·Σ_ij huber(d_ij(s) - d_ij(t)),  d_ij = ‖x_i - x_j‖ / mean of those with i ≠ j"
    source = "Park et al. 2019, sec. 3.2.1 (RKD-D)"

    def relation(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        distances = _squared_distances(x) ** 0.5 * _apart(x)
        return distances / (distances.sum() * (1 / (n * (n - 1))))


@dataclass(eq=False, kw_only=True)
class RelationalAngle(Relational):
    """Cosines of the angles that three rows of a batch make; time and memory grow as n³: 128 rows, 8 MB an array.

    The angle at j between i and k is taken from the three distances, by the law of cosines. Between a row and itself
    the cosine is 1, and 0 where j is one of the two.
    """

    formula = "1/n³·Σ_ijk huber(cos∠ijk(s) - cos∠ijk(t)),  cos∠ijk = (d_ij² + d_jk² - d_ik²) / (2·d_ij·d_jk)"
    source = "Park et al. 2019, sec. 3.2.2 (RKD-A)"

    def relation(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        squares = _squared_distances(x)
        inverse = squares**-0.5 * _apart(x)
        squares = squares * _apart(x)
        corner = squares.reshape(n, n, 1) + squares.reshape(1, n, n) - squares.reshape(n, 1, n)
        return corner * inverse.reshape(n, n, 1) * inverse.reshape(1, n, n) * 0.5


def _squared_distances(x: Tensor) -> Tensor:
    """‖x_i - x_j‖² (n, n) by one matrix product; nowhere 0, so that roots have a gradient.

    The rows' mean is taken off first, so that less cancels.
    """
    x = x - x.mean(axis=0, keepdims=True)
    lengths = (x * x).sum(axis=1, keepdims=True)
    squares = lengths + lengths.T - (x @ x.T) * 2.0
    rounding = max(ROUNDING * float(np.finfo(x.dtype).eps), product_eps(x.dtype))  # which may be of fewer digits
    floor = squares.mean() * rounding + SMALLEST_SQUARED_DISTANCE
    return squares.maximum(floor)


def _apart(x: Tensor) -> Any:
    """1 for each pair of different rows and 0 for a row with itself."""
    return note_constant(1 - here.xp.eye(x.shape[0], dtype=x.dtype))


def _huber(difference: Tensor) -> Tensor:
    """d²/2 up to |d| = 1 and |d| - 1/2 from there on."""
    distance = difference.abs()
    within = -((-distance).maximum(-1.0))  # min(|d|, 1)
    return within * (distance - within * 0.5)
