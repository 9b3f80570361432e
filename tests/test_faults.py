"""What goes wrong around a program: full disks, read-only folders, kills, files that change, signals, forks, company.

MINIKD_KILLS and MINIKD_REPLAYS make two of these tests longer; the long runs have 100 and 100,000.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd.checkpoints import Checkpoint, Checkpoints
from minikd.distillation import Experiment
from minikd.errors import DataError, OutputError
from minikd.export.c import to_c
from minikd.export.int8_file import save_int8
from minikd.export.network import Network
from minikd.export.quantise import quantise
from minikd.locks import only_writer
from minikd.nn import MLP
from minikd.report import RunFolder
from minikd.report.tensorboard import write_events
from minikd.safetensors import write_tensors, write_together, write_whole
from minikd.settings import Settings
from minikd.store.manifest import shard_path
from minikd.training import StepReport, Training

KILLS = int(os.environ.get("MINIKD_KILLS", "4"))
REPLAYS = int(os.environ.get("MINIKD_REPLAYS", "3000"))
STATUS = Path("/proc/self/statm")
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and fork of POSIX")


def child(code: str, *arguments: str | Path, before: tuple[str, ...] = (), timeout: float = 120) -> str:
    """What a fresh interpreter prints; one that hangs or fails is a failure."""
    done = subprocess.run(
        [*before, sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(kd.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


# --- no room, and no permission ---

# Everything that writes, twice: what is there before is there afterwards, whole, where the second time fails.
DISK = """
import importlib.util, json, os, resource, subprocess, sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import minikd as kd
from minikd.checkpoints import Checkpoint, Checkpoints
from minikd.errors import MinikdError
from minikd.export.c import to_c
from minikd.export.int8_file import save_int8
from minikd.export.network import Network
from minikd.export.onnx import to_onnx
from minikd.export.quantise import quantise
from minikd.nn import MLP
from minikd.report import RunFolder
from minikd.report.tensorboard import write_events
from minikd.settings import Settings

disk, trouble = Path(sys.argv[1]), sys.argv[2]
PAGE = bytes(4096)


class Told:
    classes = 4

    def __init__(self, number):
        self.identity = f"told {number}"

    def logits(self, x, rows):
        return np.float32(np.sin(np.arange(4) + 7 * rows[:, None] + len(self.identity)))


@contextmanager
def full():
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(PAGE)
        except OSError:
            pass
    yield
    filler.unlink()


@contextmanager
def limited():
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, most))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))


@contextmanager
def read_only():
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def checkpoint(place, k):
    Checkpoint(place / "state.safetensors").keep({"values": np.full(9, k)}, {"step": k})


def network(k):
    return Network.of(MLP([3, 4, 2], seed=k))


def in_int8(k):
    return quantise(network(k), np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32))


WRITERS = {
    "model": lambda place, k: kd.save(place / "m.safetensors", MLP([3, 4, 2], seed=k)),
    "checkpoint": checkpoint,
    "finished": lambda place, k: Checkpoints(place).finish("student", {"values": np.full(9, k)}, {}),
    "run": lambda place, k: RunFolder(place, overwrite=True).begin(Settings(lr=k + 1.0)),
    "results": lambda place, k: RunFolder(place).write_results(results[k]),
    "store": lambda place, k: kd.store.write(place, Told(k * 10), np.zeros((30, 2)), rows_per_shard=9, overwrite=True),
    "c": lambda place, k: to_c(network(k), place),
    "c in int8": lambda place, k: to_c(network(k), place, quantised=in_int8(k)),
    "int8": lambda place, k: save_int8(place / "m.safetensors", in_int8(k)),
    "events": lambda place, k: write_events(place, results[k].history[: 4 + k]),
}
for package, name, write in (
    ("onnx", "onnx", lambda place, k: to_onnx(network(k), place / "m.onnx")),
    ("onnx", "onnx in int8", lambda place, k: to_onnx(in_int8(k), place / "m.onnx")),
    ("matplotlib", "pictures", lambda place, k: RunFolder(place).write_pictures(results[k])),
):
    if importlib.util.find_spec(package):
        WRITERS[name] = write
results = [kd.distill((8,), (4,), "digits", teacher_epochs=1, epochs=1, seeds=(k,)) for k in (0, 1)]


def contents(place):
    return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


if trouble != "limited":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
told = {}
for name, write in WRITERS.items():
    place = disk / name
    place.mkdir()
    write(place, 0)
    before = contents(place)
    with {"full": full, "limited": limited, "read-only": read_only}[trouble]():
        try:
            write(place, 1)
            told[name] = "written"
        except MinikdError as error:
            told[name] = f"{type(error).__name__}: {error}"
        assert contents(place) == before, f"{name}: {sorted(before)} became {sorted(contents(place))}"
    write(place, 1)
    assert contents(place) != before, name
print(json.dumps(told))
"""
CAUSES = {
    "full": "No space left on device",
    "limited": "File too large",
    "read-only": "Read-only file system",
}
PRIVATE_MOUNTS = ("unshare", "--mount", "--map-root-user")


@pytest.fixture(scope="module")
def mounts() -> tuple[str, ...]:
    """What runs a command that may mount; what it mounted is gone with it."""
    if shutil.which("unshare"):
        tried = subprocess.run([*PRIVATE_MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
        if tried.returncode == 0:
            return PRIVATE_MOUNTS
    pytest.skip("needs unshare of Linux, with leave to mount, for a disk of its own")


@posix
@pytest.mark.parametrize("trouble", CAUSES)
def test_a_write_that_fails_leaves_the_former_files_whole_and_says_why(
    request: pytest.FixtureRequest, tmp_path: Path, trouble: str
) -> None:
    before = () if trouble == "limited" else request.getfixturevalue("mounts")
    told = json.loads(child(DISK, tmp_path, trouble, before=before))
    assert len(told) == 10 + 2 * bool(find_spec("onnx")) + bool(find_spec("matplotlib"))
    for name, words in told.items():
        assert words.startswith("OutputError: "), (name, words)
        assert CAUSES[trouble] in words, (name, words)
        assert str(tmp_path / name) in words, (name, words)
        assert re.search("Choose a folder|Name another", words), (name, words)


ROOM = """
import os, subprocess, sys
from pathlib import Path

import numpy as np

import minikd as kd
from minikd import cli

disk, run = Path(sys.argv[1]), Path(sys.argv[1], "run")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], check=True)
filler = disk / "filler"


def room():
    return os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize


filler.write_bytes(bytes(room() - 12 * 4096))
QUICK = "--teacher 100 --student 6 --teacher-epochs 4 --epochs 6 --labels 50 --seeds 0 --quiet".split()
assert cli.main(["distill", *QUICK, "--checkpoint-every", "5", "--out", str(run)]) == 2
filler.unlink()
assert cli.main(["distill", "--resume", str(run), "--quiet"]) == 0
assert not list(run.glob(".*"))
kd.load(run / "student.safetensors")


class Told:
    classes, identity, asked = 50, "told", 0

    def logits(self, x, rows):
        self.asked += len(rows)
        return np.float32(np.sin(np.arange(50) + 7 * rows[:, None]))


def label():
    return kd.store.write(disk / "store", teacher, np.zeros((3000, 2)), rows_per_shard=250)


filler.write_bytes(bytes(room() - 300_000))
teacher = Told()
try:
    label()
    raise AssertionError("3000 rows of 200 bytes were written to a disk that has no room for them")
except kd.errors.OutputError as error:
    print(error, file=sys.stderr)
filler.unlink()
teacher = Told()
store = label()
assert 0 < teacher.asked < 3000, teacher.asked
np.testing.assert_array_equal(store.logits(), Told().logits(None, np.arange(3000)))
"""


def test_a_run_and_a_labelling_that_ran_out_of_room_go_on_when_there_is_some(
    mounts: tuple[str, ...], tmp_path: Path
) -> None:
    done = subprocess.run(
        [*mounts, sys.executable, "-c", ROOM, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(kd.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    run, label = [line for line in done.stderr.splitlines() if "No space left on device" in line]
    assert re.match(
        r"minikd distill: error: save: .*/run/.* must be a file that can be written, got .*with room\.", run
    )
    assert re.match(r"save: shard \d+ \(rows \d+ to \d+\): .*/store/shard-\d+\.logits must be", label)


EPOCHS = [{"seed": 0, "situation": "", "model": "student", "epoch": 1, "loss": 0.5, "lr": 0.1, "terms": []}]


def writers(place: Path) -> dict[str, Callable[[], object]]:
    model = MLP([3, 4, 2], seed=0)
    return {
        "save": lambda: kd.save(place / "m.safetensors", model),
        "checkpoint": lambda: Checkpoint(place / "state.safetensors").keep({}, {}),
        "checkpoints": lambda: Checkpoints(place).finish("student", {}, {}),
        "run": lambda: RunFolder(place).begin(Settings()),
        "store": lambda: kd.store.write(place, kd.as_teacher(model), np.zeros((3, 3), np.float32)),
        "c": lambda: to_c(Network.of(model), place),
        "tensors": lambda: write_tensors(place / "t.safetensors", {}, {}),
        "int8": lambda: save_int8(place / "m.safetensors", quantise(Network.of(model), np.eye(3, dtype=np.float32))),
        "events": lambda: write_events(place, EPOCHS),
        "training": lambda: trained(1, keeper=Checkpoint(place / "state.safetensors")).run(),
    }


@pytest.mark.parametrize("name", writers(Path()))
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="taken") as refused:
        writers(tmp_path / "taken")[name]()
    assert refused.value.fix
    assert (tmp_path / "taken").read_text() == "a file"


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="needs a user whom permissions bind, not root")
@pytest.mark.parametrize("name", writers(Path()))
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path: Path, name: str) -> None:
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="locked") as refused:
        writers(place)[name]()
    assert "Permission denied" in str(refused.value)


WRITES_BY_ITSELF = {  # what is written for a compiler, or handed to a process, and thrown away afterwards
    "minikd/bench/worker.py",
    "minikd/export/targets.py",
    "minikd/export/verify.py",
    "minikd/locks.py",
    "minikd/safetensors.py",
}


def test_every_file_that_stays_is_written_whole() -> None:
    package = Path(kd.__file__).parent
    for path in package.rglob("*.py"):
        writes = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if _writes(node)]
        assert bool(writes) == (path.relative_to(package.parent).as_posix() in WRITES_BY_ITSELF), (path, writes)


def _writes(node: ast.AST) -> bool:
    """Whether this is a call that writes a file: by its name, or by a mode of `open`."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called in ("write_text", "write_bytes", "tofile", "savez", "savez_compressed", "savefig", "symlink_to"):
        return not any(isinstance(word.value, ast.Constant) for word in node.keywords if word.arg == "format")
    modes = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
    by_flag = called == "open" and "O_CREAT" in ast.unparse(node)
    return by_flag or (
        called == "open" and any(isinstance(m, str) and re.fullmatch("[rwax+bt]*[wax+][rwax+bt]*", m) for m in modes)
    )


# --- a kill in mid-write, and a power cut ---


def noted(monkeypatch: pytest.MonkeyPatch, fails: int = 0) -> list[str]:
    """What is forced to the disk and what is renamed, in order; with `fails` a folder is refused with this number."""
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("folder" if folder else "file")
        if folder and fails:
            raise OSError(fails, os.strerror(fails))
        sync(descriptor)

    def renamed(path: Path, target: Any) -> Any:
        events.append(f"rename to {Path(target).name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    return events


@posix
def test_a_file_and_then_its_new_name_are_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = noted(monkeypatch)
    write_whole(tmp_path / "a", b"1")
    assert events == ["file", "rename to a", "folder"]
    events.clear()
    write_together({tmp_path / "b": [b"1"], tmp_path / "c": [b"2", b"3"]})
    assert events == ["file", "file", "rename to b", "rename to c", "folder"]
    assert (tmp_path / "c").read_bytes() == b"23"


def test_what_is_written_many_times_a_second_is_not_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = noted(monkeypatch)
    Checkpoint(tmp_path / "state.safetensors").keep({}, {"step": 1})
    assert events == ["rename to state.safetensors"]


@posix
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_forced_to_the_disk_is_left_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    events = noted(monkeypatch, number)
    write_whole(tmp_path / "a", b"1")
    assert events[-1] == "folder"
    assert (tmp_path / "a").read_bytes() == b"1"


@posix
def test_a_disk_that_fails_when_a_name_is_kept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted(monkeypatch, errno.EIO)
    with pytest.raises(OutputError, match=r"a must be a file that can be written, got .*Input/output error"):
        write_whole(tmp_path / "a", b"1")


def test_of_files_that_belong_together_none_is_new_where_one_cannot_be_written(tmp_path: Path) -> None:
    files = {tmp_path / name: [name.encode()] for name in "abc"}
    write_together(files)
    (tmp_path / "c").unlink()
    with pytest.raises(OutputError, match="nowhere"):
        write_together({tmp_path / "a": [b"new"], tmp_path / "b": [b"new"], tmp_path / "nowhere" / "c": [b"new"]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"a", "b": b"b"}


EXPORTS = """
import sys
from pathlib import Path
from minikd.export.c import to_c
from minikd.export.network import Network
from minikd.nn import MLP

networks = [Network.of(MLP([30, 40, 5], seed=k)) for k in (0, 1)]
for k in range(10**9):
    to_c(networks[k % 2], sys.argv[1])
    if k == 0:
        print("there", flush=True)
"""


@posix
def test_c_whose_export_is_killed_is_of_one_network_or_is_told_by_the_compiler(tmp_path: Path) -> None:
    whole = []
    for k in (0, 1):
        to_c(Network.of(MLP([30, 40, 5], seed=k)), tmp_path / str(k))
        whole.append({name: (tmp_path / str(k) / name).read_bytes() for name in ("student.h", "student.c")})
    moments, place = random.Random(5), tmp_path / "c"
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", EXPORTS, str(place)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
            time.sleep(moments.uniform(0, 0.1))
            process.kill()
        found = {name: (place / name).read_bytes() for name in ("student.h", "student.c")}
        assert all(data in (whole[0][name], whole[1][name]) for name, data in found.items())
        assert found in whole or len({seal(data) for data in found.values()}) == 2


def seal(source: bytes) -> bytes:
    """The number by which a header and a source know one another."""
    (found,) = re.findall(rb"STUDENT_SEAL (?:!= )?(0x[0-9a-f]{8}UL)", source)
    return bytes(found)


@pytest.mark.parametrize("other", ["student.h", "student.c"])
def test_a_compiler_refuses_c_of_two_exports_in_words(tmp_path: Path, other: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    for k in (0, 1):
        to_c(Network.of(MLP([3, 4, 2], seed=k)), tmp_path / str(k))
    command = [compiler, "-std=c99", "-c", "student.c", "-o", "student.o"]
    subprocess.run(command, cwd=tmp_path / "0", check=True)
    shutil.copy(tmp_path / "1" / other, tmp_path / "0" / other)
    refused = subprocess.run(command, cwd=tmp_path / "0", capture_output=True, text=True)
    assert refused.returncode != 0
    assert "this file and student.h are of two exports: copy both files of one" in refused.stderr


WRITES = """
import sys
from pathlib import Path
from minikd.safetensors import write_whole

pieces = [bytes([k]) * 3_000_000 for k in (1, 2)]
for k in range(10**9):
    write_whole(Path(sys.argv[1]), pieces[k % 2], pieces[k % 2], durable=False)
    if k == 0:
        print("there", flush=True)
"""


@posix
def test_a_file_whose_writer_is_killed_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path, moments, halves = tmp_path / "file", random.Random(3), 0
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", WRITES, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
        data = path.read_bytes()
        assert data in (bytes([1]) * 6_000_000, bytes([2]) * 6_000_000)
        halves += len(list(tmp_path.glob(".file.*.part")))
        for part in tmp_path.glob(".file.*.part"):
            part.unlink()
    assert halves or KILLS < 20, "no writer was killed in mid-write"


# --- files that change while they are read ---


class Told:
    """A teacher whose answers are known."""

    classes, identity = 40, "told"

    def logits(self, x: Any, rows: np.ndarray) -> np.ndarray:
        return np.sin(np.arange(40) + 7.0 * rows[:, None]).astype(np.float32)


SCORES = Told().logits(None, np.arange(900))


@pytest.fixture
def store(tmp_path: Path) -> kd.store.Store:
    """Opened, with its first shard read."""
    opened = kd.store.write(tmp_path / "s", Told(), np.zeros((900, 2)), rows_per_shard=400)
    np.testing.assert_array_equal(opened.logits(None, [5]), SCORES[[5]])
    return opened


def test_a_shard_that_becomes_shorter_while_it_is_read_is_an_error_and_no_crash(store: kd.store.Store) -> None:
    os.truncate(shard_path(store.path, 0), 1000)
    for rows in ([5], [300], range(900)):
        with pytest.raises(
            DataError, match=r"shard-000000\.logits must be as it was written .* got a file of 1000 bytes"
        ):
            store.logits(None, list(rows))
    np.testing.assert_array_equal(store.logits(None, [450, 899]), SCORES[[450, 899]])


def test_a_shard_that_is_written_to_while_it_is_read_is_noticed(store: kd.store.Store) -> None:
    write_into(shard_path(store.path, 0))
    with pytest.raises(DataError, match="got other bytes"):
        store.logits(None, [5])


def test_a_shard_that_is_only_touched_is_read_on(store: kd.store.Store) -> None:
    os.utime(shard_path(store.path, 0))
    np.testing.assert_array_equal(store.logits(None, [5, 399, 400]), SCORES[[5, 399, 400]])


@posix
def test_a_store_that_is_written_anew_or_deleted_is_read_to_the_end_as_it_was(store: kd.store.Store) -> None:
    other = kd.as_teacher(MLP([2, 40], seed=1))
    store.logits()  # which opens all its files
    kd.store.write(store.path, other, np.zeros((900, 2)), rows_per_shard=400, overwrite=True)
    np.testing.assert_array_equal(store.logits(), SCORES)
    shutil.rmtree(store.path)
    np.testing.assert_array_equal(store.logits(), SCORES)


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    np.save(tmp_path / "rows.npy", SCORES)
    found: np.ndarray = np.load(tmp_path / "rows.npy", mmap_mode="r")
    return found


def shorten(path: Path) -> None:
    os.truncate(path, 4096)


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"other")


@posix
@pytest.mark.parametrize("change", [shorten, write_into])
def test_a_table_whose_file_changes_while_it_is_mapped_is_an_error_and_no_crash(
    tmp_path: Path, mapped: np.ndarray, change: Callable[[Path], None]
) -> None:
    teacher = kd.as_teacher(tmp_path / "rows.npy")
    np.testing.assert_array_equal(teacher.logits(None, [899]), SCORES[[899]])
    change(tmp_path / "rows.npy")
    with pytest.raises(DataError, match=r"rows\.npy must be left as it was while it is in use \(144128 bytes\), got"):
        teacher.logits(None, [899])


@posix
@pytest.mark.parametrize("change", [shorten, write_into])
def test_features_whose_file_changes_while_they_are_labelled_are_an_error_and_no_crash(
    tmp_path: Path, mapped: np.ndarray, change: Callable[[Path], None]
) -> None:
    class Changes(Told):
        def logits(self, x: Any, rows: np.ndarray) -> np.ndarray:
            if rows[0] == 400:
                change(tmp_path / "rows.npy")
            return super().logits(x, rows)

    with pytest.raises(DataError, match=r"shard 2 .*rows\.npy must be left as it was while it is in use"):
        kd.store.write(tmp_path / "s", Changes(), mapped, rows_per_shard=400)


@posix
def test_a_mapped_table_that_is_replaced_or_deleted_is_read_to_the_end_as_it_was(
    tmp_path: Path, mapped: np.ndarray
) -> None:
    teacher = kd.as_teacher(tmp_path / "rows.npy")
    write_whole(tmp_path / "rows.npy", b"other")
    np.testing.assert_array_equal(teacher.logits(None, [0, 899]), SCORES[[0, 899]])
    (tmp_path / "rows.npy").unlink()
    np.testing.assert_array_equal(teacher.logits(None, [0, 899]), SCORES[[0, 899]])


@pytest.mark.parametrize("rows", [[3], [3, 3, 2], [899, 0, 450, 450], [*range(100, 300), 7, *range(650, 400, -1)]])
def test_rows_come_in_the_order_in_which_they_are_asked_for(store: kd.store.Store, rows: list[int]) -> None:
    np.testing.assert_array_equal(store.logits(None, rows), SCORES[rows])


def test_a_store_is_read_by_several_threads_at_once(store: kd.store.Store) -> None:
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            rows = rng.integers(0, 900, 30)
            if not np.array_equal(store.logits(None, rows), SCORES[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- a signal in a long call ---


def seconds_to_ctrl_c(after: float, call: Callable[[Callable[[], None]], object]) -> float:
    """Send Ctrl-C to a call, which must end as KeyboardInterrupt; how long it computed until it did.

    The call is given a function: so many seconds after it is called, the signal is sent.
    """
    sent: list[float] = []

    def send() -> None:
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    before, timer = signal.signal(signal.SIGINT, signal.default_int_handler), threading.Timer(after, send)
    try:
        with pytest.raises(KeyboardInterrupt):
            call(timer.start)
        return time.process_time() - sent[0]
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def trained(epochs: int, **options: Any) -> Training:
    """A training that has not begun, of 100 steps an epoch."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(3000, 20)).astype(np.float32), rng.integers(0, 3, 3000)
    model = MLP([20, 30, 3], seed=0)
    return Training(model, x, y, None, epochs=epochs, batch_size=30, seed=1, **options)


def bits(model: kd.nn.Module) -> list[bytes]:
    return [value.tobytes() for value in model.state_dict().values()]


@posix
@pytest.mark.usefixtures("c_in_use")
def test_ctrl_c_is_heeded_within_an_epoch_and_whole_steps_are_done() -> None:
    rng, F = np.random.default_rng(0), kd.functional
    x, y = rng.normal(size=(64, 300)).astype(np.float32), rng.integers(0, 10, 64)

    def compiled() -> tuple[Any, kd.nn.Module, Any]:
        model = MLP([300, 200, 10], seed=0)
        opt, count = kd.optim.SGD(model.parameters(), 1e-4), np.zeros((), np.int64)

        @kd.compile
        def step(rows: Any) -> Any:
            kd.kernels.run("advance", count)
            loss = F.cross_entropy(model(F.take(x, rows)), F.take(y, rows))
            opt.zero_grad()
            loss.backward()
            opt.step()
            return loss

        return step, model, count

    rows = np.broadcast_to(np.arange(64), (1_000_000, 64))
    step, model, count = compiled()
    step.epoch(rows[:5])

    def epoch(begin: Callable[[], None]) -> None:
        begin()
        step.epoch(rows)

    waited = seconds_to_ctrl_c(0.3, epoch)
    assert waited < 1.0, f"Ctrl-C was heeded after {waited:.2f} s of computing; a call of C takes about 0.05 s"
    done = int(count)
    assert 5 < done < 1_000_000
    again, other, _ = compiled()
    again.epoch(rows[:done])
    assert bits(model) == bits(other), "a step was left half done"
    step.epoch(rows[:7])
    again.epoch(rows[:7])
    assert bits(model) == bits(other), "what was interrupted does not go on"


@posix
def test_a_training_that_ctrl_c_ended_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    whole, path, steps = trained(20).run(), tmp_path / "state.safetensors", []

    def run(begin: Callable[[], None]) -> None:
        def on_step(report: StepReport) -> None:
            steps.append(report.step)
            if len(steps) == 40:
                begin()
            time.sleep(0.01)

        trained(20, keeper=Checkpoint(path, every=30), on_step=on_step).run()

    seconds_to_ctrl_c(0.05, run)
    assert 40 <= len(steps) < whole.steps
    resumed = trained(20, keeper=Checkpoint(path, every=30)).run()
    assert bits(resumed.model) == bits(whole.model)
    assert resumed.history == whole.history


# --- fork ---

FORKED = """
import os, sys, threading, time

import numpy as np

import minikd as kd

rng = np.random.default_rng(0)
model = kd.nn.MLP([50, 300, 10], seed=0)
x, y = rng.normal(size=(2000, 50)).astype(np.float32), rng.integers(0, 10, 2000)


@kd.compile
def scores(x):
    return model(x)


wanted = scores(x).numpy().tobytes()


def right():
    return scores(x).numpy().tobytes() == wanted and model.predict_proba(x[:7]).shape == (7, 10)


def child():
    pid = os.fork()
    if pid == 0:
        os._exit(0 if right() else 1)
    for _ in range(1000):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"


assert right() and right()
print(child())
stop = threading.Event()


def busy():
    while not stop.is_set():
        assert right()


others = [threading.Thread(target=busy) for _ in range(2)]
for thread in others:
    thread.start()
print({child() for _ in range(15)})
stop.set()
for thread in others:
    thread.join()
print(right())
"""


@posix
@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_a_child_replays_the_steps_of_its_parent_whatever_other_threads_did(
    c_built: None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIKD_BACKEND", backend)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert child(FORKED).splitlines() == ["0", "{0}", "True"]


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn where there are threads
def test_a_parent_and_its_children_read_one_opened_store_at_the_same_time(store: kd.store.Store) -> None:
    children = []
    for seed in range(3):
        pid = os.fork()
        if pid == 0:
            rng, good = np.random.default_rng(seed), True
            for _ in range(100):
                rows = rng.integers(0, 900, 20)
                good = good and np.array_equal(store.logits(None, rows), SCORES[rows])
            os._exit(0 if good else 1)
        children.append(pid)
    for _ in range(30):
        np.testing.assert_array_equal(store.logits(), SCORES)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]


# --- two at one folder ---


def test_a_run_is_alone_in_its_folder_until_it_is_closed(tmp_path: Path) -> None:
    settings = Settings()
    with RunFolder(tmp_path / "run") as first:
        first.begin(settings)
        for other in (lambda: RunFolder(first.path, overwrite=True).begin(settings), RunFolder(first.path).resume):
            with pytest.raises(
                OutputError, match="must be written to by one run at a time, got a write in this process"
            ):
                other()
    assert [path.name for path in first.path.iterdir()] == ["config.toml"]
    with RunFolder(first.path) as again:
        again.resume()


def test_a_run_that_could_not_begin_leaves_its_folder_to_others(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    refused = RunFolder(tmp_path)
    with pytest.raises(OutputError, match="a folder without results"):
        refused.begin(Settings())
    with RunFolder(tmp_path, overwrite=True) as other:
        other.begin(Settings())


LONG = ["--teacher", "8", "--teacher-epochs", "1", "--student", "4", "--epochs", "2", "--seeds", "0-999", "--quiet"]


# Without pictures, which take longer than all else.
COMMAND = "import sys; sys.modules['matplotlib'] = None; from minikd.cli import main; sys.exit(main())"


def distill(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, "distill", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(kd.__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.terminate()
    return process.returncode or 0, process.communicate(timeout=60)[1]


@posix
def test_of_two_commands_that_begin_in_one_folder_at_once_one_is_refused_in_words(tmp_path: Path) -> None:
    both = [distill(*LONG, "--overwrite", "--out", tmp_path / "run") for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        while all(process.poll() is None for process in both) and time.monotonic() < deadline:
            time.sleep(0.02)
        (refused,) = [process for process in both if process.poll() is not None]
        (going,) = [process for process in both if process.poll() is None]
        assert refused.returncode == 2
        said = refused.communicate()[1]
        assert re.fullmatch(
            rf"minikd distill: error: folder: .*run must be written to by one run at a time, got "
            rf"process {going.pid} on .*, which is at it\. Wait until it ends, or name another folder\.\n",
            said,
        )
        third = distill("--resume", tmp_path / "run", "--quiet")
        assert f"process {going.pid} on" in third.communicate(timeout=60)[1]
        assert third.returncode == 2
        assert "interrupted" in stop(going)[1]
        assert going.returncode == 130
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert not (tmp_path / "run" / ".lock").exists()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["complete"] is False


@posix
def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    holds = (
        "import sys, time\nfrom pathlib import Path\nfrom minikd.locks import only_writer\n"
        "with only_writer(Path(sys.argv[1]), 'test', ''):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", holds, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(OutputError, match=rf"one writer at a time, got process {process.pid} on"),
            only_writer(tmp_path, "test", ""),
        ):
            pass
        process.kill()
    assert (tmp_path / ".lock").exists()
    with only_writer(tmp_path, "test", ""):
        pass
    assert not (tmp_path / ".lock").exists()


KEEPS = """
import sys, time
from pathlib import Path

import numpy as np

from minikd.checkpoints import Checkpoint
from minikd.distillation import Experiment
from minikd.nn import MLP
from minikd.settings import Settings
from minikd.training import Training

place, how = Path(sys.argv[1]), sys.argv[2]


def begun(*_):
    print("begun", flush=True)
    time.sleep(600)


if how == "run":
    settings = Settings(teacher=(8,), student=(4,), teacher_epochs=1, epochs=1, seeds=(0,))
    experiment = Experiment(settings, on_step=begun)
    experiment.keep_in(place)
    experiment.run()
else:
    keeper = Checkpoint(place / "state.safetensors")
    x, y = np.ones((60, 2), np.float32), np.zeros(60, int)
    Training(MLP([2, 3], seed=0), x, y, None, epochs=1, batch_size=30, seed=1, keeper=keeper, on_step=begun).run()
"""


def kept_run(place: Path) -> Experiment:
    settings = Settings(teacher=(8,), student=(4,), teacher_epochs=1, epochs=1, seeds=(0,), labels=0)
    experiment = Experiment(settings)
    experiment.keep_in(place)
    return experiment


@posix
@pytest.mark.parametrize("how", ["run", "training"])
def test_of_two_processes_that_keep_checkpoints_in_one_place_one_is_refused_in_words(tmp_path: Path, how: str) -> None:
    def another() -> Any:
        if how == "run":
            return kept_run(tmp_path).run()
        return trained(1, keeper=Checkpoint(tmp_path / "state.safetensors")).run()

    with subprocess.Popen([sys.executable, "-c", KEEPS, str(tmp_path), how], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        words = rf"must be written to by one {how} at a time, got process {process.pid} on .*Wait until it ends"
        with pytest.raises(OutputError, match=words):
            another()
        process.kill()
    another()
    assert not list(tmp_path.glob("*.lock"))


def test_checkpoints_are_removed_with_the_locks_that_a_killed_process_left(tmp_path: Path) -> None:
    experiment = kept_run(tmp_path / "kept")
    experiment.run()
    for left in (".lock", ".training.safetensors.lock", ".training.safetensors.12ab.part"):
        (tmp_path / "kept" / left).touch()
    experiment.forget_checkpoints()
    assert not (tmp_path / "kept").exists()


def test_two_trainings_of_one_process_keep_their_states_in_one_file_only_one_after_the_other(tmp_path: Path) -> None:
    first = trained(2, keeper=Checkpoint(tmp_path / "state.safetensors"))
    refused: list[str] = []

    def on_step(_: StepReport) -> None:
        if not refused:
            with pytest.raises(OutputError, match="by one training at a time, got a write in this process") as told:
                first.run()
            refused.append(str(told.value))

    trained(1, keeper=Checkpoint(tmp_path / "state.safetensors"), on_step=on_step).run()
    trained(1, keeper=Checkpoint(tmp_path / "other.safetensors"), on_step=lambda _: None).run()
    assert refused
    first.run(epochs=1)
    first.run()


# --- memory ---

LEAKS = """
import gc, os, sys

import numpy as np

import minikd as kd

F, replays = kd.functional, int(sys.argv[1])
rng = np.random.default_rng(0)
x, y = rng.normal(size=(256, 20)).astype(np.float32), rng.integers(0, 5, 256)
soft = rng.normal(size=(256, 5)).astype(np.float32)
model = kd.nn.MLP([20, 16, 5], dropout=0.1, seed=0)
opt = kd.optim.Adam(model.parameters(), 1e-3)


@kd.compile
def step(rows, temperature):
    loss = F.distillation_loss(model(F.take(x, rows)), F.take(soft, rows), F.take(y, rows), temperature=temperature)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss


def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def work(count):
    for k in range(count):
        step(np.arange(k % 7, k % 7 + 16), np.array(1.0 + k % 3))
        if k % 100 == 0:
            step.epoch(rng.integers(0, 256, (10, 16)), np.full(10, 2.0))
            model.predict_proba(x[: 1 + k % 5])
            F.softmax(x, temperature=2.0)
            try:
                step(np.full(16, 256), np.array(2.0))
            except ValueError:
                pass


work(1000)
before = resident()
work(replays)
print(resident() - before)
"""


@pytest.mark.usefixtures("c_built")
def test_replays_leave_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    if not STATUS.exists():
        pytest.skip(f"needs {STATUS} of Linux to see how much memory a process has")
    monkeypatch.setenv("MINIKD_BACKEND", "c")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    grown = int(child(LEAKS, str(REPLAYS), timeout=600))
    assert grown < 1_000_000, f"{REPLAYS} replays left {grown:,} bytes"
