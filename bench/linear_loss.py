"""The last layer with its loss in chunks of rows, against the same with the logits of all rows: time and memory.

python bench/linear_loss.py                            4096 rows, 32,000 classes, 256 hidden units, one BLAS thread
python bench/linear_loss.py --rows 512 --rounds 7      smaller; the two forms take turns in each round
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MINIKD_NUM_THREADS", "1")

import numpy as np

from minikd import functional as F

Arrays = dict[str, Any]


def chunked(a: Arrays) -> tuple[Any, ...]:
    loss, gradients = F.linear_distillation_loss(
        a["hidden"], a["weight"], a["bias"], a["teacher"], a["target"], return_grad=True
    )
    return loss, *gradients


def whole(a: Arrays) -> tuple[Any, ...]:
    logits = a["hidden"] @ a["weight"].T
    logits += a["bias"]
    loss, g = F.distillation_loss(logits, a["teacher"], a["target"], return_grad=True)
    return loss, g @ a["weight"], g.T @ a["hidden"], g.sum(axis=0)


def peak_megabytes(form: Callable[[Arrays], Any], a: Arrays) -> float:
    """The most that NumPy held at once beside the inputs and the results, in units of 10^6 bytes."""
    tracemalloc.start()
    kept = form(a)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (peak - sum(x.nbytes for x in kept)) / 1e6


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    n, c, k = options.rows, options.classes, options.hidden
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    a = {"hidden": normal(n, k), "weight": normal(c, k) / np.float32(k**0.5), "bias": normal(c)}
    a |= {"teacher": 3 * normal(n, c), "target": rng.integers(0, c, n)}
    for got, wanted in zip(chunked(a), whole(a), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    forms = {"chunked": chunked, "whole": whole}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(options.rounds):
        for name in sorted(forms, reverse=turn % 2 == 1):
            start = time.perf_counter()
            forms[name](a)
            times[name].append(time.perf_counter() - start)
    print(f"{n} rows, {c} classes, {k} hidden units, float32; results agree")
    for name, function in forms.items():
        seconds, least, megabytes = statistics.median(times[name]), min(times[name]), peak_megabytes(function, a)
        print(f"{name:8} {seconds:6.2f} s (min {least:.2f}), {megabytes:7.1f} MB beside it")
    print(f"chunked / whole: {statistics.median(times['chunked']) / statistics.median(times['whole']):.2f} of the time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
