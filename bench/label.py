"""Labelling against the teacher alone: the time that a store adds, and the memory that it takes.

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
import resource
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


def peak_megabytes() -> float:
    """The most memory of its own that this process has had, in units of 10^6 bytes; mapped files do not count."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    sizes = {name: value for name, _, value in (line.partition(":") for line in text.splitlines())}
    return float(sizes["RssAnon"].split()[0]) * 1024 / 1e6


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
    teacher = kd.as_teacher(kd.nn.MLP(SIZES, seed=0))
    with tempfile.TemporaryDirectory(dir=".") as folder, kd.threads(options.threads):
        x = rows_in_a_file(Path(folder, "x.npy"), options.rows)
        start = time.perf_counter()
        sha256 = kd.data.sha256_of(x)
        digest = time.perf_counter() - start

        def alone(turn: int) -> None:
            for k in range(0, len(x), MOST_ROWS):
                teacher.logits(np.asarray(x[k : k + MOST_ROWS]))

        def labelling(turn: int) -> None:
            settings = {"dtype": options.dtype, "top_k": options.top_k, "data_sha256": sha256}
            kd.store.write(Path(folder, f"store-{turn}"), teacher, x, **settings)

        times: dict[str, list[float]] = {"teacher alone": [], "labelling": []}
        forms = {"teacher alone": alone, "labelling": labelling}
        alone(-1)
        before = peak_megabytes()
        for turn in range(options.rounds):
            for name in sorted(forms, reverse=turn % 2 == 0):
                start = time.perf_counter()
                forms[name](turn)
                times[name].append(time.perf_counter() - start)
        peak = peak_megabytes()
        store = kd.store.open(Path(folder, "store-0"))
        print(f"{len(store):,} rows of {FEATURES} features, teacher {'-'.join(map(str, SIZES))}, {kd.threads()}")
        print(f"{store!r}: {store.bytes / 1e6:.1f} MB, KL {store.kl_error}")
    for name, taken in times.items():
        seconds = statistics.median(taken)
        print(f"{name:14} {seconds:6.3f} s (min {min(taken):.3f}), {options.rows / seconds:,.0f} rows/s")
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    print(f"labelling / teacher alone: {ratio:.3f} (median of the pairs); digest of the rows: {digest:.3f} s")
    print(f"memory of its own: {before:.0f} MB before, {peak:.0f} MB after all rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
