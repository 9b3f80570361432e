"""Stores: what a teacher said comes back, interrupted or not, and a store never stands in for what it is not of."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd import cli, labelling
from minikd.distillation import fit
from minikd.errors import ArgumentError, DataError, MinikdError, OutputError, ShapeError
from minikd.store import Store, open, write
from minikd.store.encoding import Encoding
from minikd.store.manifest import FOOTER, shard_path

N, K, C = 50, 6, 4
RNG = np.random.default_rng(3)
X = RNG.normal(size=(N, K)).astype(np.float32)
SCORES = (4 * RNG.normal(size=(N, C))).astype(np.float32)
NET = kd.nn.MLP([K, 8, C], seed=1)


class Told:
    """A teacher that gives these scores by sample number, and counts the samples that it was asked for."""

    def __init__(self, scores: np.ndarray = SCORES, identity: str = "told") -> None:
        self.scores, self.identity, self.asked = scores, identity, 0
        self.classes: int | None = scores.shape[1]

    def logits(self, x: Any, rows: Any = None) -> np.ndarray:
        assert len(x) == len(rows)
        self.asked += len(rows)
        return self.scores[rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def softmax(z: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp((z - z.max(axis=1, keepdims=True)) / temperature)
    return e / e.sum(axis=1, keepdims=True)


def divergence(z: np.ndarray, stored: np.ndarray, temperature: float) -> np.ndarray:
    """KL of each row in float64; a class that the teacher excludes adds nothing."""
    q, p = (softmax(a.astype(np.float64), temperature) for a in (z, stored))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(q > 0, q * np.log(q / p), 0).sum(axis=1)


# --- what is written comes back ---


@given(
    n=st.integers(1, 40),
    classes=st.integers(2, 12),
    per_shard=st.integers(6, 50),
    dtype=st.sampled_from(["float32", "float16"]),
    top_k=st.integers(0, 11),
    seed=st.integers(0, 2**32 - 1),
    excluded=st.booleans(),
)
def test_what_is_stored_is_what_the_teacher_said_or_as_near_as_measured(
    n: int, classes: int, per_shard: int, dtype: str, top_k: int, seed: int, excluded: bool
) -> None:
    rng = np.random.default_rng(seed)
    z = (rng.normal(size=(n, classes)) * 10 ** rng.uniform(-2, 2)).astype(np.float32)
    if excluded:
        z[rng.random((n, classes)) < 0.3] = -np.inf
        z[:, rng.integers(classes)] = 0
    top_k %= classes
    with tempfile.TemporaryDirectory() as folder:
        store = write(folder, Told(z), X[:1].repeat(n, 0), dtype=dtype, top_k=top_k, rows_per_shard=per_shard)
        rows = rng.integers(n, size=n)
        found = store.logits(None, rows)
        np.testing.assert_array_equal(found, store.logits()[rows])
        store.verify()
    assert (found.dtype, found.shape, len(store), store.classes) == (np.float32, (n, classes), n, classes)
    if dtype == "float32" and not top_k:
        np.testing.assert_array_equal(found, z[rows])
    elif not top_k:
        with np.errstate(under="ignore"):
            np.testing.assert_array_equal(found, z[rows].astype(np.float16))
    with np.errstate(under="ignore"):
        for measured in store.kl_error:
            kl = divergence(z, store_of(z, dtype, top_k), measured["temperature"])
            wanted = [kl.mean(), kl.max()]
            np.testing.assert_allclose([measured["mean"], measured["max"]], wanted, rtol=1e-6, atol=1e-12)


def store_of(z: np.ndarray, dtype: str, top_k: int) -> np.ndarray:
    """What the largest of each row and the mass of the others come to, computed row by row."""
    result = z.astype(dtype).astype(np.float64)
    for row, given_row in zip(result, z.astype(np.float64), strict=True):
        rest = np.argsort(-given_row, kind="stable")[top_k:] if top_k else []
        if len(rest):
            with np.errstate(divide="ignore"):
                row[rest] = np.log(np.exp(given_row[rest]).sum()) - np.log(len(rest))
    return result


@pytest.mark.parametrize("top_k", range(1, C))
def test_the_classes_that_are_kept_have_their_probabilities(top_k: int, tmp_path: Path) -> None:
    stored = write(tmp_path / "s", Told(), X, top_k=top_k).logits()
    kept = np.argsort(-SCORES, axis=1)[:, :top_k]
    p, q = (np.take_along_axis(softmax(z.astype(np.float64)), kept, axis=1) for z in (stored, SCORES))
    np.testing.assert_allclose(p, q, rtol=1e-5)
    np.testing.assert_array_equal(stored.argmax(axis=1), SCORES.argmax(axis=1))


def test_of_classes_that_tie_the_first_are_kept_in_their_order() -> None:
    encoding = Encoding(5, "float32", 2)
    records = np.empty(1, encoding.record)
    encoding.encode(np.array([[1.0, 7, 0, 7, 0]]), records)
    np.testing.assert_array_equal(records["classes"], [[1, 3]])


def test_many_classes_have_wide_numbers() -> None:
    z = np.zeros((1, 70_000), np.float32)
    z[0, 69_999] = 9
    encoding = Encoding(70_000, "float16", 3)
    records = np.empty(1, encoding.record)
    encoding.encode(z, records)
    assert records["classes"][0, 0] == 69_999
    assert records.nbytes == 4 + 3 * (2 + 4)
    assert encoding.decode(records)[0].argmax() == 69_999


@pytest.mark.parametrize(("dtype", "large"), [("float16", 7e4), ("float32", 1e39)])
def test_a_logit_beyond_the_dtype_is_refused_and_minus_infinity_is_not(
    dtype: str, large: float, tmp_path: Path
) -> None:
    z = SCORES.astype(np.float64)
    z[3, 1] = -np.inf
    assert np.isneginf(write(tmp_path / "s", Told(z), X, dtype=dtype).logits()[3, 1])
    z[30, 2] = large
    with pytest.raises(ArgumentError, match=rf"shard 1 .*the logits of sample 30.* as {dtype} holds them") as caught:
        write(tmp_path / "t", Told(z), X, dtype=dtype, rows_per_shard=25)
    assert "never shifted" in str(caught.value)
    assert not shard_path(tmp_path / "t", 1).exists()


def test_a_data_set_is_stored_whole_in_the_order_of_its_source_whatever_the_split(tmp_path: Path) -> None:
    y = np.arange(N) % C
    data = kd.data.load((X, y), normalise="none")
    teacher = kd.as_teacher(NET)
    store = write(tmp_path / "s", teacher, data, rows_per_shard=7)
    np.testing.assert_allclose(store.logits(), NET.logits(X), atol=1e-6)  # a row alone is rounded in another way
    other = kd.data.load((X, y), split_seed=5, validation=0.3)
    assert not np.array_equal(other.rows_train, data.rows_train)
    for part in ("train", "validation", "test"):
        found = store.logits(None, getattr(other, f"rows_{part}"))
        np.testing.assert_allclose(found, NET.logits(other.raw(getattr(other, f"x_{part}"))), atol=1e-5)
    store.check(other, teacher=teacher)


def test_a_data_set_whose_rows_are_not_numbered_through_is_refused(tmp_path: Path) -> None:
    data = kd.data.load((X, np.arange(N) % C))
    data.rows_test[0] = data.rows_train[0]
    with pytest.raises(ArgumentError, match="each number from 0 to 49 once"):
        write(tmp_path / "s", Told(), data)


def test_rows_are_read_from_a_file_that_is_mapped_into_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    store = write(tmp_path / "s", kd.as_teacher(NET), mapped, preprocessing="scaled to 1")
    store.check(data_sha256=kd.data.sha256_of(X))
    assert store.spec.preprocessing == "scaled to 1"
    assert store.spec.features == "float32 (6,)"


def test_a_store_that_is_pickled_is_opened_again(tmp_path: Path) -> None:
    store = write(tmp_path / "s", Told(), X)
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.logits(None, [4, 2]), SCORES[[4, 2]])
    assert repr(again) == f"<store {tmp_path / 's'}: 50 rows, 4 classes, float32>"


def test_more_shards_than_are_open_at_a_time_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikd.store.reading.OPENED", 2)
    store = write(tmp_path / "s", Told(), X, rows_per_shard=10)
    for _ in range(2):
        np.testing.assert_array_equal(store.logits(), SCORES)


def test_any_program_can_read_a_shard_by_what_the_manifest_says(tmp_path: Path) -> None:
    write(tmp_path / "s", Told(), X, top_k=2, rows_per_shard=30)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    record = np.dtype([(f["name"], f["dtype"], tuple(f["shape"])) for f in manifest["record"]])
    for shard, size in zip(manifest["shards"], (30, 20), strict=True):
        data = (tmp_path / "s" / shard["file"]).read_bytes()[: -manifest["footer_bytes"]]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert np.frombuffer(data, record)["logits"].shape == (size, 2)


# --- as a teacher ---


def test_a_store_teaches_as_its_teacher_does(tmp_path: Path) -> None:
    data = kd.data.load("digits")
    teacher = kd.as_teacher(kd.nn.MLP([64, 32, 10], seed=4))
    write(tmp_path / "s", teacher, data)
    stored = kd.as_teacher(tmp_path / "s", class_names=data.class_names)
    assert stored.identity == teacher.identity
    assert stored.classes == 10
    students = []
    for soft in (teacher.logits(data.raw(data.x_train)), stored.logits(None, data.rows_train)):
        student = kd.nn.MLP([64, 8, 10], seed=0)
        fit(student, data.x_train, data.y_train, soft, epochs=1)
        students.append(student.state_dict())
    for one, other in zip(*(s.values() for s in students), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_store_of_other_classes_is_no_teacher_for_these(tmp_path: Path) -> None:
    write(tmp_path / "s", Told(), X, class_names="abcd")
    assert kd.as_teacher(tmp_path / "s", class_names="abcd").classes == 4
    with pytest.raises(DataError, match=r"the classes and their order .* must be b, a, c, d, got a, b, c, d"):
        kd.as_teacher(tmp_path / "s", class_names="bacd")
    with pytest.raises(ShapeError, match="of 9 classes"):
        kd.as_teacher(tmp_path / "s", classes=9)


def test_a_store_of_other_data_teaches_nobody_alone_or_among_others(tmp_path: Path) -> None:
    y = np.arange(N) % C
    data, other = kd.data.load((X, y)), kd.data.load((X[::-1], y))
    write(tmp_path / "s", Told(), data)
    stored = kd.as_teacher(tmp_path / "s")
    both = kd.as_teacher([tmp_path / "s", NET], average="logits")
    for teacher in (stored, both, kd.as_teacher(NET)):
        teacher.check(data)
    for teacher in (stored, both):
        with pytest.raises(DataError, match=r"the data \(sha256\) of the store in"):
            teacher.check(other)
    with pytest.raises(DataError, match=r"the data \(sha256\) of the store in"):
        kd.distill(stored, (4,), other, epochs=1)


def test_a_store_can_be_made_of_a_store(tmp_path: Path) -> None:
    write(tmp_path / "s", Told(), X)
    small = write(tmp_path / "t", kd.as_teacher(tmp_path / "s"), X, top_k=1)
    assert small.identity == "told"
    np.testing.assert_array_equal(small.logits().argmax(axis=1), SCORES.argmax(axis=1))


# --- interrupted, and going on ---

KILLED = """
import sys, time
import numpy as np
from minikd.store import write

class Slow:
    classes, identity = 4, "told"
    def logits(self, x, rows):
        if rows[0] >= 30:
            print("there", flush=True)
            time.sleep(600)
        return np.load(sys.argv[2])[rows]

write(sys.argv[1], Slow(), np.load(sys.argv[3]), rows_per_shard=10)
"""


def test_a_killed_labelling_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "scores.npy", SCORES)
    np.save(tmp_path / "x.npy", X)
    command = [sys.executable, "-c", KILLED, *(str(tmp_path / name) for name in ("s", "scores.npy", "x.npy"))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(kd.__file__).parents[1])}
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"there\n"
        with pytest.raises(OutputError, match=f"process {process.pid} on .*, which is at it"):
            write(tmp_path / "s", Told(), X, rows_per_shard=10)
        deadline = time.monotonic() + 30  # what was answered before may still be on its way to the disk
        while not shard_path(tmp_path / "s", 2).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    (tmp_path / "s" / ".shard-000003.logits.0123abcd.part").write_bytes(b"half")
    with pytest.raises(DataError, match=r"one with 3 of 5 shards.*goes on from there"):
        open(tmp_path / "s")
    with pytest.raises(DataError, match=r"the teacher of the store in .* must be other, got told"):
        write(tmp_path / "s", Told(identity="other"), X, rows_per_shard=10)
    teacher, seen = Told(), []
    write(tmp_path / "s", teacher, X, rows_per_shard=10, on_progress=seen.append)
    assert teacher.asked == 20
    assert [(p.rows, p.total, p.found) for p in (seen[0], seen[-1])] == [(30, 50, 30), (50, 50, 30)]
    write(tmp_path / "whole", Told(), X, rows_per_shard=10)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_what_is_complete_is_not_asked_again_and_what_is_damaged_is(tmp_path: Path) -> None:
    for _ in range(2):
        write(tmp_path / "s", teacher := Told(), X, rows_per_shard=10)
    assert teacher.asked == 0
    before = contents(tmp_path / "s")
    flip(shard_path(tmp_path / "s", 1))
    shard_path(tmp_path / "s", 4).unlink()
    write(tmp_path / "s", teacher, X, rows_per_shard=10)
    assert teacher.asked == 20
    assert contents(tmp_path / "s") == before


def test_a_shard_that_fails_is_named_and_the_others_stay(tmp_path: Path) -> None:
    class Fails(Told):
        def logits(self, x: Any, rows: Any = None) -> np.ndarray:
            if 35 in rows:
                raise RuntimeError("out of order")
            return super().logits(x, rows)

    with pytest.raises(DataError, match=r"shard 3 \(rows 30 to 39\) must be labelled, got RuntimeError: out of order"):
        write(tmp_path / "s", Fails(), X, rows_per_shard=10)
    write(tmp_path / "s", teacher := Told(), X, rows_per_shard=10)
    assert teacher.asked == 20


def test_a_folder_where_nothing_was_finished_takes_another_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="NaN"):
        write(tmp_path / "s", Told(np.full_like(SCORES, np.nan)), X)
    assert len(write(tmp_path / "s", Told(), X, top_k=1)) == N


# --- who writes ---


def in_processes() -> Executor:
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


@pytest.mark.parametrize("make", [lambda: ThreadPoolExecutor(3), in_processes], ids=["threads", "processes"])
def test_shards_that_are_shared_out_are_the_same(make: Callable[[], Executor], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dtype": "float16", "top_k": 2, "rows_per_shard": 6}
    seen: list[Any] = []
    with make() as executor:
        write(tmp_path / "s", kd.as_teacher(NET), X, executor=executor, on_progress=seen.append, **settings)
    assert [p.rows for p in seen] == [*range(0, 50, 6), 50]
    write(tmp_path / "alone", kd.as_teacher(NET), X, **settings)
    assert contents(tmp_path / "s") == contents(tmp_path / "alone")


class Later:
    """The least that an executor is: work is done when its result is asked for."""

    def __init__(self) -> None:
        self.waiting = self.most = 0

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        packed = pickle.dumps((function, arguments))

        def result() -> Any:
            self.waiting -= 1
            function, arguments = pickle.loads(packed)
            return function(*arguments)

        return SimpleNamespace(result=result)


def test_an_executor_is_whatever_has_submit_and_never_holds_more_than_it_may(tmp_path: Path) -> None:
    executor = Later()
    write(tmp_path / "s", kd.as_teacher(NET), X, rows_per_shard=5, executor=executor, in_flight=3)
    assert (executor.most, executor.waiting) == (3, 0)
    np.testing.assert_array_equal(open(tmp_path / "s").logits(), NET.logits(X))


def test_a_worker_that_fails_says_in_which_shard(tmp_path: Path) -> None:
    scores = SCORES[:33]
    with (
        ThreadPoolExecutor(2) as executor,
        pytest.raises(DataError, match=r"shard 6 \(rows 30 to 34\) must be labelled, got IndexError"),
    ):
        write(tmp_path / "s", Told(scores), X, rows_per_shard=5, executor=executor)
    write(tmp_path / "s", teacher := Told(), X, rows_per_shard=5)
    assert teacher.asked <= 20


def test_a_teacher_that_only_the_executor_can_pickle_is_left_to_it() -> None:
    from minikd.store.writing import Shipped

    teacher = kd.as_teacher(lambda x: x, identity="here")
    assert Shipped(teacher).__reduce__() == (Shipped, (teacher,))


def test_one_store_has_one_writer(tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Waits(Told):
        def logits(self, x: Any, rows: Any = None) -> np.ndarray:
            inside.set()
            assert go_on.wait(30)
            return super().logits(x, rows)

    with ThreadPoolExecutor(1) as other:
        first = other.submit(write, tmp_path / "s", Waits(), X)
        try:
            assert inside.wait(30)
            with pytest.raises(OutputError, match="one writer at a time, got a write in this process"):
                write(tmp_path / "s", Told(), X)
        finally:
            go_on.set()
        assert len(first.result()) == N
    assert sorted(contents(tmp_path / "s")) == ["manifest.json", "shard-000000.logits"]


# --- what a store is not of ---


@pytest.fixture
def stored(tmp_path: Path) -> Store:
    return write(tmp_path / "s", Told(), X, rows_per_shard=20, class_names="abcd")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"data_sha256": "0" * 64}, r"the data \(sha256\) of the store in .* must be 0{64}, got [0-9a-f]{64}"),
        ({"teacher": "somebody else"}, "the teacher of the store in .* must be somebody else, got told"),
        ({"teacher": Told(identity="another")}, "the teacher of .* must be another, got told"),
        ({"classes": 9}, "the number of classes of .* must be 9, got 4"),
        ({"class_names": ("b", "a", "c", "d")}, "the classes and their order of .* must be b, a, c, d, got a, b, c, d"),
        ({"rows": 49}, "the number of rows of .* must be 49, got 50"),
    ],
)
def test_a_store_says_what_it_is_not_of(stored: Store, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        stored.check(**wanted)
    assert "--overwrite" in str(caught.value)


def test_a_store_may_stand_in_for_what_it_is_of(stored: Store, tmp_path: Path) -> None:
    sha256 = kd.data.sha256_of(X)
    stored.check(data_sha256=sha256, teacher=Told(), classes=4, class_names="abcd", rows=N)
    stored.check()
    nameless = write(tmp_path / "nameless", Told(), X)
    nameless.check(class_names="abcd")
    with pytest.raises(DataError, match="must be 3, got 4"):
        nameless.check(class_names="abc")
    with pytest.raises(DataError, match="the data"):
        stored.check(kd.data.load((X, np.arange(N) % C)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X + 1}, r"the data \(sha256\)"),
        ({"x": X[:40]}, r"the data \(sha256\)"),
        ({"teacher": Told(identity="new")}, "the teacher of .* must be new, got told"),
        ({"dtype": "float16"}, "dtype of .* must be float16, got float32"),
        ({"top_k": 2}, "top_k of .* must be 2, got 0"),
        ({"rows_per_shard": 10}, "rows_per_shard of .* must be 10, got 20"),
        ({"class_names": "dcba"}, "the classes and their order"),
        ({"preprocessing": "whitened"}, "the preprocessing of .* must be whitened, got none"),
    ],
)
def test_another_store_in_the_folder_is_kept_unless_it_may_go(
    stored: Store, change: dict[str, Any], message: str
) -> None:
    before = contents(stored.path)
    settings = {"teacher": Told(), "x": X, "rows_per_shard": 20, "class_names": "abcd", **change}
    with pytest.raises(DataError, match=message):
        write(stored.path, **settings)
    assert contents(stored.path) == before
    new = write(stored.path, overwrite=True, **settings)
    new.verify()
    assert len(contents(stored.path)) == new.spec.shards + 1


def test_shards_of_a_store_that_was_replaced_do_not_pass_for_the_new_ones(tmp_path: Path) -> None:
    write(tmp_path / "s", Told(), X, rows_per_shard=10)
    old = contents(tmp_path / "s")
    teacher = Told(1 - SCORES, identity="new")
    write(tmp_path / "s", teacher, X, rows_per_shard=10, overwrite=True)
    shard_path(tmp_path / "s", 2).write_bytes(old["shard-000002.logits"])  # as a worker of before might
    with pytest.raises(DataError, match=r"shard-000002\.logits must be as it was written"):
        open(tmp_path / "s").logits()
    write(tmp_path / "s", teacher, X, rows_per_shard=10)
    assert teacher.asked == 60


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"a folder with thesis\.txt"):
            write(tmp_path, Told(), X, overwrite=overwrite)
    with pytest.raises(OutputError, match="must be a folder"):
        write(tmp_path / "thesis.txt", Told(), X)
    assert sorted(contents(tmp_path)) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"teacher": len}, ArgumentError, "function_or_method without logits, classes, identity.*kd.as_teacher"),
        ({"dtype": "int8"}, ArgumentError, "dtype must be 'float32' or 'float16', got 'int8'"),
        ({"top_k": 4}, ArgumentError, "from 1 to 3, fewer than there are classes"),
        ({"top_k": -1}, ArgumentError, "top_k"),
        ({"rows_per_shard": 0}, ArgumentError, "a whole number from 1, got 0"),
        ({"class_names": "abc"}, ShapeError, "of 3 classes, got 4"),
        ({"x": X[0]}, ShapeError, r"rows of features \(n, k\), got shape \(6,\)"),
        ({"x": X[:0]}, ShapeError, "rows of features"),
        ({"teacher": Told(SCORES[:, :1])}, ShapeError, "of 2 to"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    change: dict[str, Any], kind: type[MinikdError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        write(tmp_path / "s", **{"teacher": Told(), "x": X, **change})
    assert not (tmp_path / "s").exists()


def test_a_teacher_that_does_not_know_its_classes_is_asked_and_must_keep_to_them(tmp_path: Path) -> None:
    assert write(tmp_path / "s", kd.as_teacher(lambda x: x), X).classes == K
    teacher = Told()
    teacher.classes = 7
    with pytest.raises(ShapeError, match=r"of shape \(50, 7\), got shape \(50, 4\)"):
        write(tmp_path / "t", teacher, X)


# --- damage ---


def flip(path: Path, place: int = 5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_when_its_shard_is_first_used(stored: Store) -> None:
    flip(shard_path(stored.path, 1))
    store = open(stored.path)
    np.testing.assert_array_equal(store.logits(None, [0, 45]), SCORES[[0, 45]])
    with pytest.raises(DataError, match=r"shard-000001\.logits must be as it was written .*, got other bytes"):
        store.logits(None, [20])
    with pytest.raises(DataError, match=r"shard-000001\.logits"):
        store.verify()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "a file of 832 bytes, got 831 bytes"),
        (lambda path: path.write_bytes(b""), "got 0 bytes"),
        (Path.unlink, "No such file"),
    ],
)
def test_a_shard_that_is_cut_short_or_gone_is_named_at_once(
    stored: Store, harm: Callable[[Path], Any], message: str
) -> None:
    assert 20 * 4 * C + FOOTER == 832
    harm(shard_path(stored.path, 1))
    with pytest.raises(DataError, match=rf"shard-000001\.logits must be .*{message}"):
        open(stored.path)


def test_a_shard_that_goes_while_the_store_is_open_is_named(stored: Store) -> None:
    shard_path(stored.path, 0).unlink()
    with pytest.raises(DataError, match=r"shard-000000\.logits"):
        stored.logits(None, [0])


def test_a_class_that_there_is_not_is_refused(tmp_path: Path) -> None:
    """Even if all digests are right: a store may come from anywhere."""
    write(tmp_path / "s", Told(), X, top_k=1)
    path = shard_path(tmp_path / "s", 0)
    data = bytearray(path.read_bytes())
    data[8:10] = b"\x09\x00"
    path.write_bytes(data)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = hashlib.sha256(data[:-FOOTER]).hexdigest()
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="class 9 of 4"):
        open(tmp_path / "s").logits()


def test_where_there_is_no_store_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    for folder, message in ((tmp_path, "no such file"), (tmp_path / "nix", "no such folder")):
        with pytest.raises(DataError, match=rf"{message}.*minikd label DATA --teacher T --out STORE"):
            open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\udcff", '{"format": "zip"}'])
def test_a_manifest_that_is_none_is_refused(stored: Store, text: str) -> None:
    (stored.path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"manifest\.json"):
        open(stored.path)


NONSENSE = [None, -1, 0, 1.5, True, "nonsense", [], {}, [1], 1 << 70, float("nan")]


@given(data=st.data())
def test_nonsense_in_a_manifest_is_refused_or_harmless(stored: Store, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "s")
        shutil.copytree(stored.path, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        place = data.draw(st.sampled_from([manifest, manifest["shards"][0], manifest["shards"][1]]))
        key = data.draw(st.sampled_from(sorted(place)))
        if data.draw(st.booleans()):
            place[key] = data.draw(st.sampled_from(NONSENSE))
        else:
            del place[key]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with suppress(DataError):
            np.testing.assert_array_equal(open(folder).logits(), SCORES)


# --- what may be asked ---


@pytest.mark.parametrize("rows", [[50], [0, -1], [[0, 1]], 3])
def test_a_sample_that_is_not_there_is_refused(stored: Store, rows: Any) -> None:
    with pytest.raises(ArgumentError, match=r"sample numbers \(m,\) from 0 to 49"):
        stored.logits(None, rows)


def test_a_store_knows_its_samples_and_asks_for_their_numbers(stored: Store) -> None:
    assert stored.knows([0, 49])
    assert not stored.knows([50])
    assert stored.logits(None, np.empty(0, int)).shape == (0, C)
    with pytest.raises(ArgumentError, match="logits\\(None, rows\\)"):
        stored.logits(X)


# --- minikd label ---


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in with a teacher for the digits."""
    monkeypatch.chdir(tmp_path)
    kd.save("teacher.safetensors", kd.nn.MLP([64, 16, 10], seed=2))
    return tmp_path


def test_the_command_fills_a_store_and_says_how_to_use_it(files: Path) -> None:
    line = "label digits --teacher teacher.safetensors --out s --top-k 4 --processes 2 --rows-per-shard 400"
    env = {**os.environ, "PYTHONPATH": str(Path(kd.__file__).parents[1]), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "minikd", *shlex.split(line)],
        capture_output=True,
        encoding="utf-8",
        env=env,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        "1,797, train, validation, test",
        "float32, the 4 largest of 10 classes",
        "in 5 shards, in s",
        "KL(teacher ‖ stored), mean over the rows:",
        " rows/s",
        "minikd distill --data digits --teacher s",
    ):
        assert words in done.stdout
    data = kd.data.load("digits")
    teacher, stored = kd.as_teacher("teacher.safetensors"), kd.as_teacher("s")
    open("s").check(data, teacher=teacher)
    whole = teacher.logits(data.raw(data.x_test))
    np.testing.assert_array_equal(stored.logits(None, data.rows_test).max(axis=1), whole.max(axis=1))


@pytest.mark.usefixtures("files")
def test_the_command_goes_on_and_takes_features_alone(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("x.npy", RNG.normal(size=(30, 64)))
    line = ["label", "x.npy", "--teacher", "teacher.safetensors", "--out", "s", "--dtype", "float16"]
    assert cli.main(line) == 0
    assert "kd.as_teacher('s').logits(None, rows)" in capsys.readouterr().out
    assert cli.main(line) == 0
    assert "all rows were there already" in capsys.readouterr().out
    assert cli.main([*line, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert len(open("s")) == 30


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("digits --teacher teacher.safetensors --out s --top-k 10", "error: --top-k must be from 1 to 9"),
        ("digits --teacher teacher.safetensors --out s --rows-per-shard 0", "error: --rows-per-shard must be"),
        ("nix.npz --teacher teacher.safetensors --out s", "error: DATA must be one of digits"),
        ("nix.npy --teacher teacher.safetensors --out s", "nix.npy must be an array of features"),
        ("digits --teacher nix.onnx --out s", "error: --teacher must be a file that ends in"),
        ("digits --teacher t.pkl --out s", "--allow-pickle"),
    ],
)
def test_an_error_names_the_option(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.pkl").write_bytes(b"")
    assert cli.main(["label", *line.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("number", ["0", "x", "-1"])
def test_processes_are_counted_from_one(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["label", "digits", "--teacher", "t", "--out", "s", "--processes", number])
    assert "--processes must be a whole number from 1" in capsys.readouterr().err


WORKERS = """
import os, signal
from minikd.labelling import _workers

if __name__ == "__main__":
    with _workers(2) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        print("at work", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_command_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    env = {**os.environ, "PYTHONPATH": str(Path(kd.__file__).parents[1])}
    done = subprocess.run(  # returns when the last of them has let go of the output
        [sys.executable, "workers.py"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"at work\n")


@pytest.mark.usefixtures("files")
def test_after_ctrl_c_the_command_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kd.store, "write", interrupted)
    assert cli.main(["label", "digits", "--teacher", "teacher.safetensors", "--out", "s"]) == 130
    assert "What is labelled stays: the same command goes on from there." in capsys.readouterr().err


def test_a_long_labelling_tells_where_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelling, "SECONDS_BETWEEN_LINES", 0)
    with labelling._meter(sys.stderr, quiet=False) as meter:
        meter(kd.store.Progress(10, 50, 10, 0.1))
        meter(kd.store.Progress(30, 50, 10, 2.0))
    assert capsys.readouterr().err == "10 of 50 rows, no rows yet\n30 of 50 rows, 10 rows/s\n"
    bar = pytest.importorskip("rich") and labelling._Bar(sys.stderr)
    with bar:
        bar(kd.store.Progress(30, 50, 10, 2.0))
    assert bar.last.rows == 30


def test_shards_are_read_alike_where_the_system_has_no_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    z = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    write(tmp_path / "store", kd.teachers.TableTeacher(z), z, rows_per_shard=20)
    rows = np.array([49, 0, 7, 20, 19])
    usual = open(tmp_path / "store").logits(None, rows)
    monkeypatch.delattr(os, "preadv")
    np.testing.assert_array_equal(open(tmp_path / "store").logits(None, rows), usual)


def test_a_manifest_with_as_many_names_as_there_are_not_classes_is_damaged(tmp_path: Path) -> None:
    z = np.zeros((5, 3), np.float32)
    write(tmp_path / "store", kd.teachers.TableTeacher(z), z, class_names=list("abc"))
    (path,) = (tmp_path / "store").glob("*.json")
    content = json.loads(path.read_text("utf-8"))
    content["class_names"].append("d")
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(DataError, match="as many as there are names, got top_k 0, 4 class names"):
        open(tmp_path / "store")


def test_a_shard_that_becomes_shorter_while_it_is_open_is_damaged(tmp_path: Path) -> None:
    z = np.zeros((50, 7), np.float32)
    write(tmp_path / "store", kd.teachers.TableTeacher(z), z)
    found = open(tmp_path / "store")
    found.logits(None, np.array([0]))
    os.truncate(shard_path(tmp_path / "store", 0), 40)
    with pytest.raises(DataError):
        found.logits(None, np.array([49]))


def test_a_store_of_all_logits_in_float32_says_that_it_lost_nothing(tmp_path: Path) -> None:
    z = np.zeros((5, 3), np.float32)
    stored = write(tmp_path / "store", kd.teachers.TableTeacher(z), z)
    assert labelling.error_in_words(stored) == "none: all logits, in float32"
