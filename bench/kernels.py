"""The kernel benchmark, in a checkout: the same as `minikd bench`, with its results beside this file.

python bench/kernels.py                    everything; see bench/README.md for how long that takes
python bench/kernels.py --quick            under a minute
python bench/kernels.py --update-readme    write the tables of the last run into README.md and bench/README.md
"""

from __future__ import annotations

import sys

from minikd.bench import add_arguments, run
from minikd.bench.suite import script

if __name__ == "__main__":
    sys.exit(script(__file__, __doc__, add_arguments, run))
