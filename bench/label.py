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

# The clock on the wall, the processors' work for this process, and that for the thread which asks the teacher.
CLOCKS = (time.perf_counter, time.process_time, time.thread_time)
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
        times: dict[str, list[list[float]]] = {name: [] for name in forms}
        alone(-1)
        before, held = megabytes(), []
        for turn in range(options.rounds):
            for name in sorted(forms, reverse=turn % 2 == 0):
                before_it = [clock() for clock in CLOCKS]
                forms[name](turn)
                times[name].append([clock() - start for clock, start in zip(CLOCKS, before_it, strict=True)])
        labelling(options.rounds, lambda progress: held.append(megabytes()))
        store = kd.store.open(Path(folder, "store-0"))
        print(f"{len(store):,} rows of {FEATURES} features, teacher {'-'.join(map(str, SIZES))}, {kd.threads()}")
        print(f"{store!r}: {store.bytes / 1e6:.1f} MB, KL {store.kl_error}")
    print(
        "medians of the rounds: seconds by the clock, of the processors, of the thread that asks; ratios are of pairs"
    )
    for name, taken in times.items():
        seconds = [statistics.median(column) for column in zip(*taken, strict=True)]
        print(f"{name:14} {' '.join(f'{s:7.3f}' for s in seconds)}   {options.rows / seconds[0]:,.0f} rows/s")
    pairs = list(zip(*times.values(), strict=True))
    ratios = [statistics.median(b[k] / a[k] for a, b in pairs) for k in range(len(CLOCKS))]
    print(f"{'ratio':14} {' '.join(f'{r:7.3f}' for r in ratios)}")
    print(f"digest of the rows: {digest:.3f} s; memory of its own: {before:.0f} MB before, at most {max(held):.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
