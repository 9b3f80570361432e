"""Whatever reads bytes reads them or refuses them in words, quickly and in little memory, however they were changed.

MINIKD_FUZZ=100000 sets how many files of each kind are tried, MINIKD_FUZZ_SEED which. `tests/fuzz/run.py` looks for
others, led by the coverage of the code.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.changes import File, mutants, zipped
from fuzz.targets import TARGETS, Reader, Target, most_memory

import minikd as kd
from minikd.checkpoints import Checkpoint, Checkpoints
from minikd.data.archive import mapped_npy
from minikd.errors import DataError, MinikdError, ModelFormatError

COUNT = int(os.environ.get("MINIKD_FUZZ", "300"))
SEED = int(os.environ.get("MINIKD_FUZZ_SEED", "0"))
MOST_MEMORY = 4 << 20  # bytes; no file has ten thousand


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    found = TARGETS[request.param]
    if found.missing():
        pytest.skip(found.missing())
    return found


@pytest.fixture
def seeds(target: Target, tmp_path: Path) -> list[bytes]:
    (tmp_path / "whole").mkdir()
    return target.seeds(tmp_path / "whole")


def test_changed_files_are_read_or_refused(target: Target, seeds: list[bytes], tmp_path: Path) -> None:
    read = Reader(target, tmp_path / "changed")
    for raw in mutants(seeds, target.changes, COUNT, SEED):
        read(raw)
    assert read.read > COUNT // 50  # so the others are not refused for one and the same reason


def test_changed_files_take_little_memory(target: Target, seeds: list[bytes], tmp_path: Path) -> None:
    read = Reader(target, tmp_path / "changed")
    for raw in seeds:
        read(raw)
    assert most_memory(read, list(mutants(seeds, target.changes, COUNT // 4, SEED + 1))) < MOST_MEMORY


# --- what once came out as another error, or took gigabytes ---


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + data


def in_the_metadata(**texts: str | None) -> Callable[[bytes], bytes]:
    """Other texts in the metadata of a safetensors file; None takes one out."""

    def change(raw: bytes) -> bytes:
        file = File.of(raw)
        header = json.loads(file.text)
        about = {**header["__metadata__"], **texts}
        header["__metadata__"] = {name: text for name, text in about.items() if text is not None}
        return file.with_header(header, random.Random(0)).bytes

    return change


def in_the_facts(**facts: Any) -> Callable[[bytes], bytes]:
    """Other facts in a checkpoint; ... takes one out."""

    def change(raw: bytes) -> bytes:
        about = json.loads(File.of(raw).text)["__metadata__"]
        changed = {**json.loads(about["facts"]), **facts}
        return in_the_metadata(facts=json.dumps({n: v for n, v in changed.items() if v is not ...}))(raw)

    return change


def scaled(scale: float) -> Callable[[bytes], bytes]:
    """Another scale of the first layer's inputs in a file of int8."""

    def change(raw: bytes) -> bytes:
        layers = json.loads(json.loads(File.of(raw).text)["__metadata__"]["layers"])
        layers[0]["input"][0] = scale
        return in_the_metadata(layers=json.dumps(layers))(raw)

    return change


def with_kl(value: int | float) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        content = json.loads(raw)
        for shard in content["shards"]:
            shard["error"][0] = [value, value]
        return json.dumps(content).encode()

    return change


def packed(method: int) -> Callable[[bytes], bytes]:
    """The same archive, packed in another way."""

    def change(raw: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            return zipped([(name, archive.read(name)) for name in archive.namelist()], method)

    return change


def line(text: str) -> Callable[[bytes], bytes]:
    return lambda raw: text.encode()


OPEN_HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (2L, ("
NEGATIVE = "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2)}"
ONCE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a .npy header whose brackets stay open": ("table-npy", lambda raw: npy(OPEN_HEADER)),
    "a .npy header like that in an archive": (
        "npz",
        lambda raw: zipped([("x.npy", npy(OPEN_HEADER)), ("y.npy", npy(OPEN_HEADER))]),
    ),
    "a .npy file of a size that no integer holds": (
        "table-npy",
        lambda raw: npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 2)}"),
    ),
    "a .npy file of a negative size": ("table-npy", lambda raw: npy(NEGATIVE, bytes(16))),
    "a .npy file of a size that is True": (
        "table-npy",
        lambda raw: npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3)}", bytes(12)),
    ),
    "an array of an archive of a size that is True": (
        "table-npz",
        lambda raw: zipped(
            [("logits.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}", bytes(4)))]
        ),
    ),
    "an archive that is packed as LZMA": ("npz", packed(zipfile.ZIP_LZMA)),
    "an archive that is packed as bzip2": ("table-npz", packed(zipfile.ZIP_BZIP2)),
    "half an archive": ("table-npz", lambda raw: raw[:-30]),
    "a setting of 400 digits": ("config", line("temperature = 1" + "0" * 400)),
    "a configuration of brackets": ("config", line("student = " + "[" * 3000 + "]" * 3000)),
    "a text times a large number": ("objective", line("HardLabels('a' * 999999999)")),
    "a list times a large number": ("objective", line("HardLabels(999999999 * [0])")),
    "a number of 400 digits times a fraction": ("objective", line("HardLabels(0.5 * 1" + "0" * 400 + ")")),
    "a checkpoint that does not say its run": ("checkpoint", in_the_metadata(run=None)),
    "a checkpoint that does not say its training": ("checkpoint", in_the_metadata(training=None)),
    "a checkpoint of brackets": ("checkpoint", in_the_metadata(facts="[" * 100_000)),
    "a checkpoint without its step": ("checkpoint", in_the_facts(step=...)),
    "a checkpoint of a step that the training has not": ("checkpoint", in_the_facts(step=7)),
    "a checkpoint without a history": ("checkpoint", in_the_facts(history=...)),
    "a checkpoint whose history is a number": ("checkpoint", in_the_facts(history=3)),
    "a checkpoint that does not say whether it stopped early": ("checkpoint", in_the_facts(stopped_early=...)),
    "a checkpoint that does not say its best epoch": ("checkpoint", in_the_facts(best=...)),
    "a checkpoint of a best epoch without its figures": ("checkpoint", in_the_facts(best={"epoch": 1})),
    "a checkpoint of a best epoch without its weights": (
        "checkpoint",
        in_the_facts(best={"epoch": 1, "accuracy": 0.5, "nll": 0.5}),
    ),
    "a store whose error is a number of 400 digits": ("manifest", with_kl(10**400)),
    "a store whose errors have no finite sum": ("manifest", with_kl(1.7e308)),
    "a scale that float32 does not hold": ("int8", scaled(1e300)),
}


@pytest.mark.parametrize("name", ONCE)
def test_it_is_refused_in_words(name: str, tmp_path: Path) -> None:
    target, change = TARGETS[ONCE[name][0]], ONCE[name][1]
    (tmp_path / "whole").mkdir()
    (tmp_path / "changed").mkdir()
    raw = change(target.seeds(tmp_path / "whole")[0])
    target.beside(tmp_path / "changed")
    path = tmp_path / "changed" / target.file

    def refused(raw: bytes) -> None:
        path.write_bytes(raw)
        with pytest.raises(MinikdError):
            target.read(path)

    assert most_memory(refused, [raw]) < MOST_MEMORY


def test_a_report_of_brackets_is_that_of_a_run_that_was_stopped(tmp_path: Path) -> None:
    read = Reader(TARGETS["report"], tmp_path)
    read(b"[" * 100_000)
    assert read.read == 1


def test_a_store_of_a_trillion_shards_that_is_not_finished_is_refused_at_once(tmp_path: Path) -> None:
    target = TARGETS["manifest"]
    content = json.loads(target.seeds(tmp_path)[0])
    content |= {"complete": False, "rows": 1 << 50, "rows_per_shard": 1 << 10}
    (tmp_path / target.file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"one with 2 of {1 << 40} shards"):
        target.read(tmp_path / target.file)


def test_a_store_of_signalling_nans_is_read_without_a_warning_and_refused_as_a_teacher(tmp_path: Path) -> None:
    target = TARGETS["shard"]
    (tmp_path / "whole").mkdir()
    records = target.seeds(tmp_path / "whole")[0]
    read = Reader(target, tmp_path / "store")
    read(b"\x01\x00\x80\x7f" + records[4:])  # the first record's tail
    with pytest.raises(MinikdError, match="a largest score that is a finite number"):
        kd.as_teacher(tmp_path / "store").logits(None, np.arange(8))


def test_of_two_checkpoints_the_one_that_says_its_step_is_taken(tmp_path: Path) -> None:
    keeper = Checkpoint(tmp_path / "a.safetensors", training="t")
    keeper.keep({}, {"step": 4})
    (tmp_path / "a.safetensors").rename(tmp_path / "a.next.safetensors")
    Checkpoint(tmp_path / "b.safetensors", training="t").keep({}, {"step": "x"})
    (tmp_path / "b.safetensors").rename(tmp_path / "a.safetensors")
    kept = Checkpoint(tmp_path / "a.safetensors", training="t").kept()
    assert kept is not None
    assert kept[1] == {"step": 4}


def test_a_finished_model_without_its_history_is_refused_in_words(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.finish("one", {}, {"history": 3})
    with pytest.raises(ModelFormatError, match="must be a model with its history"):
        kept.finished("one")


def test_a_header_of_python_2_is_read_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "old.npy"
    path.write_bytes(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 1L)}", bytes(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(mapped_npy(path), np.zeros((2, 1), np.float32))


def test_a_mapped_array_is_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.empty((0, 4))):
        np.save(path, array)
        found = mapped_npy(path)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
    assert isinstance(kd.teachers.tables.read_table(path).table, np.ndarray)


@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
@pytest.mark.parametrize("shape", [[0, 1 << 40], [1 << 40, 0]])
def test_a_network_of_weights_without_a_number_takes_no_memory(operator: str, shape: list[int]) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'minikd[onnx]'")
    kind, helper = onnx.TensorProto.FLOAT, onnx.helper
    weight = onnx.TensorProto(name="w", data_type=kind, dims=shape, raw_data=b"")
    ends = [helper.make_tensor_value_info(name, kind, ["n", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(operator, ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    raw = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]).SerializeToString()

    def refused(raw: bytes) -> None:
        with pytest.raises(ModelFormatError):
            kd.export.from_onnx(raw)

    assert most_memory(refused, [raw]) < MOST_MEMORY
