"""A student in C on small processors that are not there: flash, memory and instructions, and whether its bits hold.

python bench/devices.py                                       digits, 64-16-10
python bench/devices.py --data fashion-mnist --hidden 30 30   needs the images, see minikd.data
python bench/devices.py --student student.safetensors         one that is trained already

Needs the extra: pip install 'minikd[device]'. Every processor predicts the same three rows of the test part. What is
counted are instructions, not cycles: the same on every machine, for one version of Zig.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

import minikd as kd
from minikd import metrics
from minikd.bench.report import markdown_table
from minikd.data import Dataset, Normalisation
from minikd.distillation import fit
from minikd.export.device import device_table
from minikd.export.network import Network
from minikd.export.quantise import quantise
from minikd.nn import MLP

ROWS, CALIBRATION_ROWS, TRAINING_ROWS = 3, 500, 20_000
COLUMNS = ("flash_bytes", "stack_bytes", "instructions")


def trained(data: Dataset, hidden: list[int], epochs: int) -> MLP:
    """A student of raw features that has learned from labels alone: its weights are real, its accuracy is no aim."""
    x, y = raw(data, data.x_train[:TRAINING_ROWS]), data.y_train[:TRAINING_ROWS]
    model = MLP([x.shape[1], *hidden, data.classes], seed=0)
    scale = (np.full(x.shape[1], figure, np.float32) for figure in (x.mean(), x.std()))
    normalisation = Normalisation(*scale)
    fit(model, normalisation.apply(x), y, None, seed=0, epochs=epochs)
    model.normalisation = normalisation
    model.eval()
    return model


def raw(data: Dataset, x: np.ndarray) -> np.ndarray:
    return data.raw(x).astype(np.float32).reshape(len(x), -1)


def cell(value: int | bool | None) -> str:
    if value is None:
        return "–"
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--hidden", type=int, nargs="*", default=[16])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--level", default="-Os", choices=["-O2", "-Os"])
    options = parser.parse_args()
    data = kd.data.load(options.data)
    model = kd.load(options.student) if options.student else trained(data, options.hidden, options.epochs)
    network = Network.of(model)
    quantised = quantise(network, raw(data, data.x_train[:CALIBRATION_ROWS]))
    x, y = raw(data, data.x_test), data.y_test
    exact, coarse = (100 * metrics.accuracy(scores, y) for scores in (model.logits(x), quantised.logits(x)))
    with tempfile.TemporaryDirectory() as folder:
        table = device_table(Path(folder), network, quantised, x[:ROWS], level=options.level)
    rows = [[row["target"], row["form"], *(cell(row[name]) for name in (*COLUMNS, "bits_equal"))] for row in table]
    sizes = "-".join(map(str, network.sizes))
    print(f"{data.name}, {sizes}, {network.multiply_adds:,} multiply-adds, accuracy {exact:.2f} %, int8 {coarse:.2f} %")
    print(f"Zig {version('ziglang')}, {options.level}; Unicorn {version('unicorn')}\n")
    print(markdown_table(("processor", "form", "flash, bytes", "stack, bytes", "instructions", "same bits"), rows))


if __name__ == "__main__":
    main()
