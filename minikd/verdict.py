"""The verdict: what paired differences allow to be said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["compare", "t_quantile"]

# Two-sided 95 % quantiles of Student's t for 1, 2, … 30 degrees of freedom.
T_95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t: tabled, and beyond the table the normal one with its first term."""
    return T_95[degrees - 1] if degrees <= len(T_95) else 1.960 + 2.372 / degrees


def compare(alone: Sequence[float], distilled: Sequence[float], resolution: float = 0.0) -> dict[str, Any]:
    """The paired differences distilled - alone, their mean and 95 % t-interval, and the verdict that it allows.

    "helped" or "hurt" where the interval leaves out 0, else "no clear difference"; "not enough seeds" below two.
    The deviation is taken to be at least `resolution`, the accuracy that one row of the test part is worth: two seeds
    that happen to gain the same few rows prove nothing.
    """
    differences = [float(d - a) for a, d in zip(alone, distilled, strict=True)]
    n = len(differences)
    mean = float(np.mean(differences)) if n else None
    interval = None
    verdict = "not enough seeds"
    if n >= 2:
        deviation = max(float(np.std(differences, ddof=1)), resolution)
        half = t_quantile(n - 1) * deviation / math.sqrt(n)
        interval = [float(np.mean(differences)) - half, float(np.mean(differences)) + half]
        verdict = "helped" if interval[0] > 0 else "hurt" if interval[1] < 0 else "no clear difference"
    difference = {"per_seed": differences, "mean": mean, "interval": interval, "confidence": 0.95}
    return {"difference": difference, "verdict": verdict}
