"""Labelling beside the teacher alone: the time that a store adds, and the memory that it takes.

python bench/label.py                          1,000,000 rows of 64 features, teacher 64-256-256-10
python bench/label.py --dtype float16          with the rounding's KL measured on every row
python bench/label.py --top-k 3 --threads 1    both alternate, the teacher first in every other round

The rows are mapped into memory from a file. The teacher alone answers them in the pieces that a store asks for, and
its answers are dropped. The labelling is `store.write` from its first line to the opened store; the digest of the rows,
which a data set has from its loading, is timed apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import minikd as kd
from minikd.store.writing import MOST_ROWS

FEATURES, SIZES = 64, (64, 256, 256, 10)


def megabytes() -> float:
    """Memory of its own that this process has now, in units of 10^6 bytes; mapped files do not count (Linux)."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return float(next(value for name, _, value in lines if name == "RssAnon").split()[0]) * 1024 / 1e6


def rows_in_a_file(path: Path, rows: int) -> Any:
    rng = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, "w+", np.float32, (rows, FEATURES))
    for start in range(0, rows, MOST_ROWS):
        piece = file[start : start + MOST_ROWS]
        piece[...] = rng.standard_normal(piece.shape, dtype=np.float32)
    file.flush()
    return np.load(path, mmap_mode="r")


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the teacher (default: all cores)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--top-k", type=int, default=0)
    options = parser.parse_args()
    teacher = kd.as_teacher(kd.nn.MLP(SIZES, seed=0).eval())
    with tempfile.TemporaryDirectory(dir=".") as folder, kd.threads(options.threads):
        x = rows_in_a_file(Path(folder, "x.npy"), options.rows)
        start = time.perf_counter()
        sha256 = kd.data.sha256_of(x)
        digest = time.perf_counter() - start

        def alone(turn: int) -> None:
            for k in range(0, len(x), MOST_ROWS):
                teacher.logits(np.asarray(x[k : k + MOST_ROWS]))

        def labelling(turn: int, on_progress: Any = None) -> None:
            settings = {"dtype": options.dtype, "top_k": options.top_k, "data_sha256": sha256}
            kd.store.write(Path(folder, f"store-{turn}"), teacher, x, on_progress=on_progress, **settings)

        forms: dict[str, Any] = {"teacher alone": alone, "labelling": labelling}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
        alone(-1)
        before, held = megabytes(), []
        for turn in range(options.rounds):
            for name in sorted(forms, reverse=turn % 2 == 0):
                start, work = time.perf_counter(), time.process_time()
                forms[name](turn)
                times[name].append((time.perf_counter() - start, time.process_time() - work))
        labelling(options.rounds, lambda progress: held.append(megabytes()))
        store = kd.store.open(Path(folder, "store-0"))
        print(f"{len(store):,} rows of {FEATURES} features, teacher {'-'.join(map(str, SIZES))}, {kd.threads()}")
        print(f"{store!r}: {store.bytes / 1e6:.1f} MB, KL {store.kl_error}")
    for name, taken in times.items():
        seconds, work = (statistics.median(column) for column in zip(*taken, strict=True))
        rate = f"{options.rows / seconds:,.0f} rows/s"
        print(f"{name:14} {seconds:6.3f} s (min {min(taken)[0]:.3f}, work {work:.3f}), {rate}")
    ratio, work = (statistics.median(b[k] / a[k] for a, b in zip(*times.values(), strict=True)) for k in range(2))
    print(
        f"labelling / teacher alone: {ratio:.3f} of the time, {work:.3f} of the processors' work (medians of the pairs)"
    )
    print(f"digest of the rows: {digest:.3f} s; memory of its own: {before:.0f} MB before, at most {max(held):.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
