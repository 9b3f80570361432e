"""The benchmark on a GPU, in a checkout: the same as `minikd bench --backend cupy`, with its results beside this file.

python bench/gpu.py                    everything; some minutes, most of which the reference in float64 takes
python bench/gpu.py --quick            one shape of each kernel
python bench/gpu.py --update-readme    write the tables of the last run between <!-- gpu --> and <!-- end gpu -->
"""

from __future__ import annotations

import argparse
import sys

from minikd.bench import add_arguments, run
from minikd.bench.suite import script


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.set_defaults(backend="cupy")


if __name__ == "__main__":
    sys.exit(script(__file__, __doc__, _add_arguments, run))
