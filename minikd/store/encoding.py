"""How a teacher's logits lie on disk: rounded or not, all classes or the largest few, and what that costs in KL."""

from __future__ import annotations

from typing import Any

import numpy as np

from minikd import functional as F
from minikd.errors import ArgumentError

REALS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
TEMPERATURES = (1.0, 4.0)  # at which the error is measured
MOST_CLASSES = 1 << 24


class Encoding:
    """One row of logits as one record of bytes, little-endian and without gaps.

    With top_k = 0 a record is the c logits. Else it is, in this order:

    tail : float32, log Σ exp z over the classes that are left out: their mass at T = 1 as one bucket.
    logits : the k largest logits as they are, never softened or shifted, the largest first.
    classes : their ids, uint16 or, for more than 65,536 classes, uint32.

    Decoding gives every class that was left out the logit tail - log(c - k). So at T = 1 the classes that were kept
    have the probabilities that the teacher gave them.
    """

    def __init__(self, classes: int, dtype: str, top_k: int) -> None:
        self.classes, self.top_k, self._real = classes, top_k, REALS[dtype]
        self.exact = dtype == "float32" and not top_k
        ids = np.dtype("<u2" if classes <= 1 << 16 else "<u4")
        rows: list[Any] = [("logits", self._real, (top_k or classes,))]
        self.record = np.dtype([("tail", "<f4"), *rows, ("classes", ids, (top_k,))] if top_k else rows)

    def encode(self, logits: np.ndarray, records: np.ndarray, first: int = 0) -> None:
        """Write logits (n, c), float32 or float64, into n records; `first` is the first sample's number, for errors.

        Errors: ArgumentError where a finite logit is beyond the range of the stored dtype.
        """
        if self.top_k:
            kept = np.argpartition(logits, self.classes - self.top_k, axis=1)[:, -self.top_k :]
            kept.sort(axis=1)  # so that classes that tie stand in the order of their ids
            order = np.argsort(-np.take_along_axis(logits, kept, axis=1), axis=1, kind="stable")
            kept = np.take_along_axis(kept, order, axis=1)
            records["tail"], records["classes"] = _mass_without(logits, kept), kept
            logits = np.take_along_axis(logits, kept, axis=1)
        with np.errstate(over="ignore", under="ignore"):  # what overflows is refused below
            records["logits"] = logits
        if self._real.itemsize < logits.dtype.itemsize:
            self._refuse_overflow(logits, records["logits"], first)

    def _refuse_overflow(self, logits: np.ndarray, stored: np.ndarray, first: int) -> None:
        lost = np.isinf(stored) & np.isfinite(logits)
        if lost.any():
            row, column = np.argwhere(lost)[0]
            wider = "dtype='float32' holds larger numbers" if self._real.itemsize == 2 else "Give smaller logits"
            raise ArgumentError(
                "store.write",
                f"the logits of sample {first + row}",
                expected=f"of at most {float(np.finfo(self._real).max):g} in size, as {self._real.name} holds them",
                got=f"{logits[row, column]:g}",
                fix=f"{wider}; logits are stored as they are, never shifted.",
            )

    def decode(self, records: np.ndarray) -> np.ndarray:
        """Logits float32 (n, c) of n records."""
        with np.errstate(invalid="ignore"):  # NaN, which no teacher may give, is refused where one is asked
            if not self.top_k:
                return np.ascontiguousarray(records["logits"], np.float32)
            rest = records["tail"] - np.float32(np.log(self.classes - self.top_k))
            logits = np.repeat(rest[:, None], self.classes, axis=1)
            np.put_along_axis(logits, records["classes"].astype(np.int64), records["logits"].astype(np.float32), axis=1)
            return logits

    def error(self, logits: np.ndarray, records: np.ndarray) -> np.ndarray:
        """KL(teacher ‖ stored) of each row at each of TEMPERATURES: float64 (2, n), computed in float64."""
        wide, stored = logits.astype(np.float64), self.decode(records).astype(np.float64)
        return np.stack([_divergence(wide, stored, t) for t in TEMPERATURES])


def _mass_without(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """log Σ exp z (n,) over the classes that are not in `kept` (n, k); -inf where they have no mass."""
    rest = logits.astype(np.float64)
    np.put_along_axis(rest, kept, -np.inf, axis=1)
    top = rest.max(axis=1)
    top[np.isneginf(top)] = 0
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant
        return np.asarray(np.log(np.exp(rest - top[:, None]).sum(axis=1)) + top)


def _divergence(teacher: np.ndarray, stored: np.ndarray, temperature: float) -> np.ndarray:
    """KL(softmax(teacher / T) ‖ softmax(stored / T)) (n,); rounding may take it below 0, which is 0 then."""
    q, p = (F.of_host(F.log_softmax, z, temperature=temperature) for z in (teacher, stored))
    pointwise = np.asarray(F.of_host(F.kl_div, p, q, reduction="none", log_target=True))
    return np.maximum(pointwise.sum(axis=1), 0)
