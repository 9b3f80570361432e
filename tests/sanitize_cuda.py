"""The kernels on a card under NVIDIA's compute-sanitizer: reads and writes out of bounds, races in shared memory.

python tests/sanitize_cuda.py                      memcheck, then racecheck; some minutes each
python tests/sanitize_cuda.py --tool initcheck     another of its tools
python tests/sanitize_cuda.py -- -k softmax        what stands behind -- goes to pytest; its -k replaces ours

The sanitizer is looked for on the PATH, then in the package that ``pip install nvidia-cuda-sanitizer-api-cu12`` brings.
The exit code is 0 if it found nothing, 1 if it did or a test failed, 2 if it or a GPU is not there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import minikd as kd

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
USUAL = TOOLS[:2]
FOUND_SOMETHING = 9  # what the sanitizer ends with then; pytest itself ends with 5 at most
# Those that run every kernel by itself; graphs launch the same ones once more.
CHOSEN = ("-m", "gpu", "-k", "kernels")


def in_package() -> Path | None:
    """The sanitizer in NVIDIA's Python package, or None."""
    try:
        package = importlib.util.find_spec("nvidia.cuda_sanitizer_api")
    except ModuleNotFoundError:
        return None
    for folder in (package.submodule_search_locations or ()) if package else ():
        program = Path(folder, "bin", "compute-sanitizer")
        if program.is_file():
            return program
    return None


def sanitizer() -> list[str] | None:
    """How the sanitizer is called here, or None if it is not installed."""
    on_path = shutil.which("compute-sanitizer")
    if on_path:
        return [on_path]
    program = in_package()
    if program is None:
        return None
    if not os.access(program, os.X_OK):  # pip installs it as a file like any other
        program.chmod(program.stat().st_mode | 0o111)
    return [str(program), "--injection-path", str(program.parents[1] / "lib")]


def command(called: list[str], tool: str, pytest_arguments: list[str]) -> list[str]:
    """The whole command for one tool."""
    checked = [*called, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING)]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_gpu.py")]
    return [*checked, sys.executable, *tests, *CHOSEN, *pytest_arguments]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(USUAL))
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, behind --")
    options = parser.parse_args()
    called, reason = sanitizer(), kd.backends()["cupy"].reason
    if called is None:
        print("compute-sanitizer is not installed: pip install nvidia-cuda-sanitizer-api-cu12", file=sys.stderr)
        return 2
    if reason:
        print(f"the kernels cannot run here: {reason}", file=sys.stderr)
        return 2
    # CuPy's pool is one piece of memory to the sanitizer; without it every array is a piece of its own.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "MINIKD_WITHOUT_POOL": "1"}
    codes = {}
    for tool in options.tool:
        print(f"--- {tool} ---", flush=True)
        codes[tool] = subprocess.run(command(called, tool, options.pytest), env=environment, check=False).returncode
    for tool, code in codes.items():
        print(f"{tool}: {'nothing found' if code == 0 else 'see above' if code != FOUND_SOMETHING else 'ERRORS FOUND'}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
