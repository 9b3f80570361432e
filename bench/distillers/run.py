"""One distiller in a process of its own: python -m distillers.run MODULE TASK.npz prints its figures as JSON."""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def run(module: str, file: str) -> dict[str, Any]:
    """Import the distiller, hand it the task, and score the student; only the distillation is in `seconds`."""
    started = time.perf_counter()
    distiller = importlib.import_module(f"distillers.{module}")
    imported = time.perf_counter()
    task = distiller.Task.load(file)
    began = time.perf_counter()
    predict = distiller.distil(task)
    seconds, peak = time.perf_counter() - began, peak_bytes()
    right = predict(task.arrays["x_test"]) == task.arrays["y_test"]
    figures = {"seconds": seconds, "import_seconds": imported - started, "peak_bytes": peak}
    return figures | {"test_accuracy": float(right.mean())}


def peak_bytes() -> int:
    """The most that this process held so far (Linux). `ru_maxrss` would begin with what its parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
