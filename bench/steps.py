"""Whole steps: training, distillation and prediction beside what else there is; results stand beside this file.

python bench/steps.py                                  everything, each contender once more alone
python bench/steps.py --quick                          two small steps, one thread
python bench/steps.py --step sgd-64-32-10 --peers jax numpy --no-alone
python bench/steps.py --update-readme                  write the tables of the last run into the READMEs
"""

from __future__ import annotations

import sys

from minikd.bench.steps import add_arguments, run
from minikd.bench.suite import script

if __name__ == "__main__":
    sys.exit(script(__file__, __doc__, add_arguments, run))
