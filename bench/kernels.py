"""The kernel benchmark, in a checkout: the same as `minikd bench`, with its results beside this file.

python bench/kernels.py                    everything; see bench/README.md for how long that takes
python bench/kernels.py --quick            under a minute
python bench/kernels.py --update-readme    write the tables of the last run into README.md and bench/README.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minikd.bench import add_arguments, run

HERE = Path(__file__).resolve().parent


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add_arguments(parser)
    parser.set_defaults(out=str(HERE / "kernels.json"))
    options = parser.parse_args()
    if options.update_readme == []:
        options.update_readme = [str(HERE / "README.md")]
        root = HERE.parent / "README.md"
        options.update_readme += [str(root)] if root.exists() else []
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
