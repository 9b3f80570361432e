"""The text of a CUDA source with everything that it includes, as one file.

NVRTC has no folders of headers, and CuPy remembers what it has compiled by the text alone; so the headers stand in the
text. Those that the C kernels share lie in csrc in a checkout, and are put beside the CUDA sources where minikd is
built into a wheel (setup.py).
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from minikd.errors import BackendError

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "csrc"
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)


def find(name: str) -> Path:
    """Where a source or header is.

    Raises
    ------
    BackendError : it is missing.
    """
    for folder in (HERE, SHARED):
        if (folder / name).is_file():
            return folder / name
    expected = f"{name} in {HERE} or in {SHARED}"
    raise BackendError("the CUDA kernels", name, expected=expected, got="no such file", fix="Reinstall minikd.")


@cache
def source(name: str) -> str:
    """The text of a source, each header in the place of its first inclusion.

    Raises
    ------
    BackendError : a file is missing.
    """
    seen: set[str] = set()

    def text(name: str) -> str:
        def included(match: re.Match[str]) -> str:
            header = match[1]
            if header in seen:
                return ""
            seen.add(header)
            return text(header)

        return _INCLUDE.sub(included, find(name).read_text("utf-8"))

    return text(name)
