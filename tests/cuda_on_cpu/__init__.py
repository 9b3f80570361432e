"""CUDA sources run on the processor, behind the few calls of CuPy that minikd makes.

    from cuda_on_cpu import RawModule
    module = RawModule(code=source, options=("-DMINIKD_DOUBLE=0",))
    module.get_function("name")((blocks,), (threads,), (array, numpy.int64(array.size)), shared_mem=1024)

The source is compiled by g++ as C++17 with `cuda_on_cpu.h` in front of it, each thread becoming a fibre; libraries are
kept in a temporary folder of this user by the digest of what they were made from, so that no process makes again what
another one made. An argument is an array of NumPy
(or anything with `.data.ptr`), a NumPy scalar, or a Python number: an int is an int64 or an address, a float a double.
Wrong numbers and sizes of arguments, unequal barriers and shuffles raise `LaunchError`. Options for g++, such as
-fsanitize=address, may be added in CUDA_ON_CPU_OPTIONS.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(")
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w ]+?)\s+(\w+)\[\s*\];")
_MESSAGE = 512

# No contraction, as the sources are compiled for a card with --fmad=false; nothing of the speed matters here.
OPTIONS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")
WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-unused-variable",
    "-Wno-unused-parameter",
)


class LaunchError(Exception):
    """What a card would leave undefined, or the driver would refuse."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("order", ctypes.c_int),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_size_t),
    )


def compiler() -> str | None:
    """The C++ compiler that there is."""
    return shutil.which("g++")


def sanitized() -> dict[str, str] | None:
    """The environment of a child process in which sources are compiled with the sanitizers of addresses and of what C++
    leaves undefined, such as a vector that is read where none may begin; None without them."""
    if compiler() is None:
        return None
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    library = found.stdout.strip()
    if not Path(library).is_absolute():
        return None
    return {
        **os.environ,
        "CUDA_ON_CPU_OPTIONS": "-fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(HEADER.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }


@cache
def _folder() -> Path:
    """Where this user's libraries are; what each was made from is in its name."""
    folder = Path(tempfile.gettempdir(), f"cuda_on_cpu-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's code would be run
        raise PermissionError(f"{folder} belongs to another user: delete it, or set TMPDIR to a folder of your own")
    return folder


def as_cpp(code: str) -> str:
    """A CUDA source as the compiler takes it, with an entry for each kernel behind it."""
    body = _DYNAMIC.sub(r"\1 *const \2 = static_cast<\1 *>(cuda_on_cpu::dynamic_shared());", code)
    # the preprocessor makes kernels too, so names are looked for in what it leaves
    return f'#include "{HEADER}"\n#line 1 "kernel.cu"\n{body}\n'


def _preprocessed(code: str, options: tuple[str, ...]) -> str:
    """The source with its own macros replaced, in which the names of all kernels stand."""
    plain = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("#include"))
    done = subprocess.run(
        ["g++", "-E", "-P", "-x", "c++", *options, "-"], input=plain, capture_output=True, text=True, check=True
    )
    return done.stdout


def kernel_names(code: str, options: tuple[str, ...] = ()) -> list[str]:
    """The names of the kernels in a source."""
    return list(dict.fromkeys(_KERNEL.findall(_preprocessed(code, options))))


def build(code: str, options: tuple[str, ...], extra: tuple[str, ...] = ()) -> Path:
    """The library of a source, compiled once for each text and options."""
    kept = tuple(o for o in options if o.startswith(("-D", "-I", "-U")))
    if "-ftz=true" in options:
        kept = (*kept, "-DCUDA_ON_CPU_FTZ")
    command = ("g++", *OPTIONS, *WARNINGS, *kept, *extra)
    made_from = code, command, HEADER.read_text("utf-8"), Path(str(compiler())).stat().st_mtime_ns
    library = _folder() / f"{hashlib.sha256(repr(made_from).encode()).hexdigest()[:24]}.so"
    if not library.exists():
        entries = "\n".join(f"CUDA_ON_CPU_KERNEL({name})" for name in kernel_names(code, kept))
        with tempfile.TemporaryDirectory(dir=_folder()) as place:
            source, part = Path(place, "kernel.cpp"), Path(place, library.name)
            source.write_text(as_cpp(code) + entries + "\n", "utf-8")
            done = subprocess.run([*command, str(source), "-o", str(part)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise LaunchError(f"the source cannot be compiled:\n{done.stderr}")
            part.replace(library)
    return library


class RawModule:
    """The kernels of one source, as `cupy.RawModule`."""

    order = 0  # of the threads and blocks: 0 as they are numbered, 1 the other way round, 2 mixed
    extra: tuple[str, ...] = tuple(os.environ.get("CUDA_ON_CPU_OPTIONS", "").split())  # for g++ alone

    def __init__(self, *, code: str, options: tuple[str, ...] = (), backend: str = "nvrtc") -> None:
        if backend != "nvrtc":
            raise ValueError(f"backend is {backend!r}, and only nvrtc takes these sources")
        # CuPy puts this behind all options that it is given; in numbers of 64 bits it changes nothing
        self.code, self.options = code, options if "-DMINIKD_DOUBLE" in options else (*options, "-ftz=true")
        self._functions: dict[str, RawKernel] = {}

    def get_function(self, name: str) -> RawKernel:
        if name not in self._functions:
            library = ctypes.CDLL(str(build(self.code, self.options, self.extra)))
            self._functions[name] = RawKernel(library, name)
        return self._functions[name]


class RawKernel:
    """One kernel, as `cupy.RawKernel`: called with grid, block and arguments."""

    max_threads_per_block = 1024
    max_shared_bytes = 232448  # what a block may be given at most, on a card of compute capability 9.0

    def __init__(self, library: Any, name: str) -> None:
        self.name, self.library = name, library
        try:
            self._run = getattr(library, f"cuda_on_cpu_run_{name}")
        except AttributeError:
            raise LaunchError(f"the source has no kernel named {name}") from None
        sizes = getattr(library, f"cuda_on_cpu_sizes_{name}")
        sizes.restype = ctypes.POINTER(ctypes.c_int)
        found, self.sizes = sizes(), []
        while found[len(self.sizes)]:
            self.sizes.append(found[len(self.sizes)])
        self._most = 48 << 10

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._most

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        if size > self.max_shared_bytes:
            raise LaunchError(f"{self.name}: {size} bytes of shared memory are more than {self.max_shared_bytes}")
        self._most = size

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: Any, *, shared_mem: int = 0) -> None:
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        too_many = grid[0] >= 2**31 or max(grid[1:]) >= 2**16 or int(np.prod(block)) > self.max_threads_per_block
        if min(*grid, *block) < 1 or too_many:
            raise LaunchError(f"{self.name}: a grid of {grid} blocks of {block} threads cannot be launched")
        if shared_mem > self._most:
            raise LaunchError(f"{self.name}: {shared_mem} bytes of shared memory, and {self._most} are allowed")
        values = [_as_bytes(a) for a in args]
        if [len(v) for v in values] != self.sizes:
            given = [len(v) for v in values]
            raise LaunchError(f"{self.name}: arguments of {given} bytes, where {self.sizes} are declared")
        kept = [ctypes.create_string_buffer(v, max(16, len(v))) for v in values]
        pointers = (ctypes.c_void_p * max(1, len(kept)))(*[ctypes.addressof(k) for k in kept])
        message = ctypes.create_string_buffer(_MESSAGE)
        how = _Launch(
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            shared_mem,
            RawModule.order,
            ctypes.cast(message, ctypes.c_char_p),
            _MESSAGE,
        )
        self._run(ctypes.byref(how), pointers)
        if message.value:
            raise LaunchError(f"{self.name}: {message.value.decode()}")


def _as_bytes(argument: Any) -> bytes:
    """An argument as the kernel's parameter holds it."""
    if argument is None:
        return bytes(8)
    if isinstance(argument, np.generic):
        return argument.tobytes()
    if isinstance(argument, bool):
        return np.bool_(argument).tobytes()
    if isinstance(argument, int):
        return argument.to_bytes(8, "little", signed=argument < 2**63)
    if isinstance(argument, float):
        return np.float64(argument).tobytes()
    address = argument.ctypes.data if isinstance(argument, np.ndarray) else argument.data.ptr
    return int(address).to_bytes(8, "little")
