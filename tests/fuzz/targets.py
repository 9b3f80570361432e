"""Everything that reads bytes which somebody else may have written: one target for each kind of file.

A target's files are read, or refused with a MinikdError (the runtime's own ModelFormatError there). Anything else that
comes out, a warning too, is a finding.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minikd as kd
from minikd import data, objectives, runtime, store
from minikd.checkpoints import Checkpoint
from minikd.checkpoints import write as write_checkpoint
from minikd.data import Normalisation
from minikd.data.idx import read_idx
from minikd.errors import MinikdError
from minikd.export import from_onnx, read_tensors, to_onnx, write_tensors
from minikd.export.elf import read_elf
from minikd.export.int8_file import load_int8, save_int8
from minikd.export.network import Network
from minikd.export.quantise import quantise
from minikd.report.config import from_toml, to_toml
from minikd.report.folder import RunFolder
from minikd.settings import Settings
from minikd.store.manifest import FOOTER, NAME, shard_name
from minikd.teachers.tables import read_table
from minikd.training import Training

from .changes import (
    IN_THE_BYTES,
    IN_THE_HEADER,
    PLAIN,
    Change,
    changed_footer,
    changed_json,
    changed_message,
    nested,
    npy_header,
    within_gzip,
    within_zip,
    words,
)

REFUSALS = (MinikdError, runtime.ModelFormatError)


class Target(NamedTuple):
    """One kind of file.

    name : on the command line.
    file : what it is called, in a folder of its own; its ending decides how some are read.
    seeds : whole files, from an empty folder in which they may be made.
    read : reads the file; what stands beside it in its folder is from `beside`.
    changes : groups of changes, which take turns.
    beside : puts what belongs to the file into its folder, once.
    requires : a package without which the target cannot be read.
    """

    name: str
    file: str
    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path], Any]
    changes: Sequence[Sequence[Change]]
    beside: Callable[[Path], Any] = lambda folder: None
    requires: str = ""

    def missing(self) -> str:
        """Why the target cannot be read here, or an empty text if it can."""
        return f"needs {self.requires}" if self.requires and find_spec(self.requires) is None else ""


class Slot:
    """One file that is written over again and again; to make it anew each time can take a hundred times as long."""

    def __init__(self, folder: Path, name: str = "m") -> None:
        self.path = folder / name
        self.path.touch()

    def holds(self, raw: bytes) -> Path:
        with self.path.open("r+b") as file:
            file.write(raw)
            file.truncate()
        return self.path


class Reader:
    """Reads one target's files, in a folder of its own; `read` counts those that were not refused."""

    def __init__(self, target: Target, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        target.beside(folder)
        self._target, self._slot, self.read = target, Slot(folder, target.file), 0

    def __call__(self, raw: bytes) -> None:
        """Read these bytes; what is no refusal comes out, and every warning as an error."""
        path = self._slot.holds(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                self._target.read(path)
            except REFUSALS:
                return
        self.read += 1


def most_memory(read: Callable[[bytes], Any], raws: Iterable[bytes]) -> int:
    """Bytes that Python and NumPy had at most at any moment, touched or not."""
    tracemalloc.start()
    try:
        for raw in raws:
            read(raw)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- data sets ---


def idx_files(folder: Path) -> list[bytes]:
    arrays = [(0x08, np.arange(24, dtype=np.uint8).reshape(2, 3, 4)), (0x0D, np.linspace(0, 1, 6, dtype=">f4"))]
    arrays += [(0x0E, np.array(2.5, ">f8")), (0x0B, np.empty((3, 0), ">i2"))]
    return [struct.pack(f">HBB{a.ndim}I", 0, code, a.ndim, *a.shape) + a.tobytes() for code, a in arrays]


def npz_files(folder: Path) -> list[bytes]:
    x, y = np.random.default_rng(0).normal(size=(16, 2)), np.arange(16) % 2
    parts = {"x_train": x, "y_train": y, "x_test": x[:4], "y_test": y[:4], "class_names": np.array(["a", "b"])}
    return [saved(np.savez, x=x, y=y), saved(np.savez_compressed, **parts)]


def saved(save: Callable[..., Any], *arrays: Any, **named: Any) -> bytes:
    """What NumPy writes of these arrays."""
    content = io.BytesIO()
    save(content, *arrays, **named)
    return content.getvalue()


def csv_files(folder: Path) -> list[bytes]:
    rows = [f"{k},{k % 5 - 2.5e-1},{'ab'[k % 2]}" for k in range(16)]
    numbered = [f'"{k % 3}",{k}.0' for k in range(16)]
    return ["\n".join(["u,v,label", *rows]).encode(), "\r\n".join(["\ufefflabel,x", *numbered, "-1,3", ""]).encode()]


CSV_WORDS = (
    *(",", ",,", '"', '""', "\n", "\r", "\0", ";", "nan", "inf", "1e400", "1_0", "-1", "", "label", "u", " ", "\u0663"),
    *("9" * 5000, "a" * 200_000, "\ud800", "0x10", "1e-320", "3e38", "1" * 30),
)
CSV = ((*PLAIN,), (words(*CSV_WORDS),))
NPY = ((*PLAIN,), (npy_header,))
NPZ = ((*PLAIN,), tuple(map(within_zip, (*PLAIN, npy_header, npy_header))))


# --- models ---


def network(*sizes: int, activation: str = "tanh", **options: Any) -> kd.nn.MLP:
    """A network with all that a file can hold."""
    model = kd.nn.MLP(list(sizes), activation, seed=3, **options)
    model.normalisation = Normalisation(np.arange(sizes[0], dtype=np.float32), np.full(sizes[0], 2, np.float32))
    model.class_names = ("a", "naïve ✓", *"cdefgh")[: sizes[-1]]
    return model


def model_files(folder: Path) -> list[bytes]:
    """Files of version 2 with all that a file can hold and with little, and one of version 1."""
    kd.save(folder / "full", network(4, 6, 5, 3, dropout=0.25))
    kd.save(folder / "small", kd.nn.MLP([3, 2], dtype=np.float64))
    about = {"format": "minikd", "format_version": "1", "sizes": "[4, 6, 3]", "activation": "relu"}
    about |= {"dropout": "0.0", "input_dropout": "0.0", "seed": "0", "class_names": '["a", "b", "c"]'}
    write_tensors(folder / "old", kd.nn.MLP([4, 6, 3]).state_dict(), about)
    return [(folder / name).read_bytes() for name in ("full", "full", "small", "old")]


def int8_files(folder: Path) -> list[bytes]:
    for activation in ("tanh", "relu"):
        rows = np.random.default_rng(1).normal(size=(40, 4))
        save_int8(folder / activation, quantise(Network.of(network(4, 6, 5, 3, activation=activation)), rows))
    return [(folder / activation).read_bytes() for activation in ("tanh", "relu")]


def onnx_files(folder: Path) -> list[bytes]:
    for activation in ("gelu", "relu"):
        to_onnx(network(3, 4, 2, activation=activation), folder / activation)
    return [(folder / activation).read_bytes() for activation in ("gelu", "relu")]


def tensor_files(folder: Path) -> list[bytes]:
    kinds = {"h": np.float16, "i": np.int64, "b": np.int8}
    tensors = {name: np.ones((2, 3), kind) for name, kind in kinds.items()}
    write_tensors(folder / "kinds", {**tensors, "none": np.zeros((0, 4)), "one": np.array(3.0)}, {"about": "✓"})
    write_tensors(folder / "bare", {"t": np.ones(5, np.float32)}, {})
    return [(folder / name).read_bytes() for name in ("kinds", "bare")]


SAFETENSORS = (IN_THE_BYTES, IN_THE_HEADER)


# --- runs ---

FACTS: dict[str, Any] = {
    "step": 3,
    "best": {"epoch": 1, "accuracy": 0.5, "nll": 0.7},
    "stopped_early": False,
    "history": [{"epoch": 1, "loss": 0.5}],
}


def training() -> Training:
    x, y = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32), np.arange(12) % 2
    return Training(network(3, 4, 2, dropout=0.1), x, y, epochs=2, batch_size=4, validation=(x, y), patience=2)


def checkpoint_files(folder: Path) -> list[bytes]:
    tensors, _ = training().state()
    best = {**tensors, "best": tensors["values"], "measured": np.arange(4)}
    write_checkpoint(folder / "begun", tensors, {**FACTS, "best": None}, "run", "one", durable=False)
    write_checkpoint(folder / "best", best, FACTS, "run", "one", durable=False)
    return [(folder / name).read_bytes() for name in ("begun", "best")]


@cache
def trained() -> Training:
    """The training that every state is put into."""
    return training()


def read_checkpoint(path: Path) -> None:
    found = Checkpoint(path, run="run", training="one").kept()
    if found is not None:
        trained().restore(*found)


def config_files(folder: Path) -> list[bytes]:
    some = {"temperature": 2.0, "student": (8,), "activation": "gelu", "temperature_schedule": "linear(1, 0.25)"}
    terms = "HardLabels(0.3) + ReverseKL(0.7)"
    plain, named = Settings(**some), Settings(objective=terms, teacher="t.safetensors", assistants="32, 16-16")
    return [to_toml(settings).encode() for settings in (plain, named)]


def read_config(path: Path) -> None:
    table = from_toml(path)
    table.pop("out", None)
    Settings(**table).check()


TOML_WORDS = (
    *(
        "=",
        "\n",
        "#",
        '"',
        "'",
        '"""',
        "[",
        "]",
        "{",
        "}",
        "[[a]]",
        "a.b",
        ",",
        "true",
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
    ),
    *(
        "1e400",
        "9" * 400,
        "9" * 5000,
        "0x_1",
        "1_000",
        "1979-05-27",
        '""',
        '"\\ud800"',
        "\ud800",
        "\0",
        "[1, 2]",
        "[[1]]",
    ),
    *('"linear(1)"', '"warmup(2)"', '"HardLabels(0.3) * 3"', "out", "seeds", "objective", "preset", '"keras"'),
)


def objective_files(folder: Path) -> list[bytes]:
    texts = ("HardLabels(0.3) + SoftLabels(0.7, temperature=4)", "DecoupledKD(1, alpha=1, beta=8) + Hints(0.5)")
    texts += ("preset('keras')", "ReverseKL(0.5, weight_schedule='cosine(1, 0)', temperature=2) + DIST(1.0)")
    return [text.encode() for text in texts]


OBJECTIVE_WORDS = (
    *objectives.NAMES,
    *("(", ")", "[", "]", ",", "+", "*", "-", "'", '"', "=", "**", "preset", "weight", "temperature", "None", "True"),
    *("1e400", "nan", "9" * 400, "9" * 5000, "10**9", "'a'", "'a' * 99999999", "[0] * 99999999", "(1,)", "1j", "b''"),
    *("f'{1}'", "lambda: 0", "x", "\0", "\ud800", "\n", "\\", "...", "'linear(1, 0)'", "'step(1)'", "1 is 1", "'\\d'"),
)


def read_objective(path: Path) -> None:
    objectives.parse(path.read_bytes().decode("utf-8", "replace"))


def reports(folder: Path) -> list[bytes]:
    return [b'{"complete": true, "seeds": [0, 1]}']


def read_report(path: Path) -> None:
    RunFolder(path.parent).resume()


# --- teachers ---

X = np.random.default_rng(3).normal(size=(12, 2)).astype(np.float32)
TABLE = np.random.default_rng(4).normal(size=(12, 3)).astype(np.float32)


def read_scores(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TableTeacher: the answers look like")  # advice on purpose, on what was read
        read_table(path, class_names=("a", "b", "c")).logits(X, np.arange(len(X)))


def npy_files(folder: Path) -> list[bytes]:
    return [saved(np.save, TABLE), saved(np.save, np.asfortranarray(TABLE.astype(">f8")))]


def table_archives(folder: Path) -> list[bytes]:
    scores = np.exp(TABLE) / np.exp(TABLE).sum(axis=1, keepdims=True)
    return [saved(np.savez, logits=TABLE), saved(np.savez_compressed, probs=scores, other=X)]


def table_texts(folder: Path) -> list[bytes]:
    return ["\n".join(["b,a,c", *(",".join(f"{v:.3f}" for v in row) for row in TABLE)]).encode()]


class Scores:
    """A teacher that gives TABLE."""

    classes, identity = 3, "scores"

    def logits(self, x: Any, rows: Any = None) -> np.ndarray:
        return TABLE[rows]


def write_store(folder: Path) -> None:
    store.write(folder, Scores(), X, rows_per_shard=8, dtype="float16", top_k=2, overwrite=True)


def manifests(folder: Path) -> list[bytes]:
    write_store(folder)
    whole = (folder / NAME).read_bytes()
    return [whole, whole, whole.replace(b'"complete": true', b'"complete": false')]


def shards(folder: Path) -> list[bytes]:
    write_store(folder)
    return [(folder / shard_name(0)).read_bytes()]


def read_store(path: Path) -> None:
    """A store, its manifest or one of its shards in other bytes: opened, read and compared with its digests."""
    found = store.open(path.parent)
    found.logits()
    found.verify()


def read_shard(path: Path) -> None:
    """The shard beside a manifest that says that its records are as they should be, so that what they say is read."""
    content = json.loads((path.parent / "whole.json").read_bytes())
    content["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()[:-FOOTER]).hexdigest()
    (path.parent / NAME).write_text(json.dumps(content))
    read_store(path)


def beside_a_shard(folder: Path) -> None:
    write_store(folder)
    (folder / NAME).rename(folder / "whole.json")


# --- other programs' files ---


def elf_files(folder: Path) -> list[bytes]:
    """An object of 32 bits: a header, a section of code, names, and a table of one symbol."""
    names, code = b"\0.text\0.names\0.symbols\0main\0", b"\x01\x02\x03\x04"
    symbols = struct.pack("<3I2BH", 0, 0, 0, 0, 0, 0) + struct.pack("<3I2BH", 24, 0, 4, 0x12, 0, 1)
    start = 52 + len(code) + len(names) + len(symbols)
    head = b"\x7fELF\x01\x01\x01".ljust(16, b"\0") + struct.pack(
        "<2H5I6H", 1, 40, 1, 0, 0, start, 0, 52, 0, 0, 40, 4, 2
    )
    places = [52, 52 + len(code), 52 + len(code) + len(names)]
    sections = [(0,) * 10, (1, 1, 6, 0, places[0], 4, 0, 0, 4, 0), (7, 3, 0, 0, places[1], len(names), 0, 0, 1, 0)]
    sections.append((14, 2, 0, 0, places[2], len(symbols), 2, 1, 4, 16))
    return [head + code + names + symbols + b"".join(struct.pack("<10I", *section) for section in sections)]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("idx", "images", idx_files, read_idx, (PLAIN,)),
        Target(
            "idx-gz",
            "images.gz",
            lambda folder: [gzip.compress(raw, mtime=0) for raw in idx_files(folder)],
            read_idx,
            (PLAIN, tuple(map(within_gzip, PLAIN))),
        ),
        Target("npz", "data.npz", npz_files, data.load, NPZ),
        Target("csv", "data.csv", csv_files, data.load, CSV),
        Target("safetensors", "tensors", tensor_files, read_tensors, SAFETENSORS),
        Target("model", "model", model_files, kd.load, SAFETENSORS),
        Target("runtime", "model", model_files, runtime.load, SAFETENSORS),
        Target("int8", "model", int8_files, load_int8, SAFETENSORS),
        Target("onnx", "model.onnx", onnx_files, from_onnx, (PLAIN, (changed_message,)), requires="onnx"),
        Target("checkpoint", "state.safetensors", checkpoint_files, read_checkpoint, SAFETENSORS),
        Target("config", "config.toml", config_files, read_config, (PLAIN, (words(*TOML_WORDS), nested("[", "]")))),
        Target(
            "objective",
            "text",
            objective_files,
            read_objective,
            ((words(*OBJECTIVE_WORDS),), (nested("(", ")"), *PLAIN)),
        ),
        Target(
            "report",
            "report.json",
            reports,
            read_report,
            (PLAIN, (changed_json, nested("[", "]"))),
            beside=lambda folder: (folder / "config.toml").touch(),
        ),
        Target("manifest", NAME, manifests, read_store, (PLAIN, (changed_json, nested("[", "]"))), beside=write_store),
        Target("shard", shard_name(0), shards, read_shard, (PLAIN, (changed_footer(FOOTER),)), beside=beside_a_shard),
        Target("table-npy", "table.npy", npy_files, read_scores, NPY),
        Target("table-npz", "table.npz", table_archives, read_scores, NPZ),
        Target("table-csv", "table.csv", table_texts, read_scores, CSV),
        Target("elf", "object", elf_files, lambda path: read_elf(path.read_bytes()), (PLAIN,)),
    )
}
