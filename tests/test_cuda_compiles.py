"""The CUDA sources compiled for real cards by NVRTC, which needs no card: no warnings, no registers spilt to memory.

python tests/test_cuda_compiles.py [sm_90]      what each kernel takes of registers and shared memory
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minikd.kernels.cuda.launches import OPTIONS, STATIC_SHARED
from minikd.kernels.cuda.sources import source
from minikd.kernels.cuda.table import KERNELS, VARIANTS

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
# What CuPy puts behind the options that it is given.
OF_CUPY = ("-ftz=true", "--device-as-default-execution-space")
SOURCES = sorted({step.source for steps in KERNELS.values() for step in steps})


@cache
def nvrtc() -> Any:
    """NVIDIA's compiler as a library: of its package, or of an installed toolkit; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place, "cuda_nvrtc", "lib") for place in (spec.submodule_search_locations or [])] if spec else []
    found = [str(path) for folder in folders for path in sorted(folder.glob("libnvrtc.so.[0-9]*"))]
    found += [name for name in [ctypes.util.find_library("nvrtc")] if name]
    return ctypes.CDLL(found[0]) if found else None


class Usage(NamedTuple):
    """What one kernel takes."""

    registers: int
    spilt: int
    shared: int


def log_of(program: Any) -> str:
    size = ctypes.c_size_t()
    nvrtc().nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc().nvrtcGetProgramLog(program, text)
    return text.value.decode()


def compiled(name: str, dtype: str, architecture: str) -> tuple[dict[str, Usage], list[str]]:
    """What each kernel of a source takes, and what the compiler said beside that."""
    options = [f"-arch={architecture}", *OPTIONS, *OF_CUPY, "--ptxas-options=-v"]
    options += ["-DMINIKD_DOUBLE"] if dtype == "float64" else []
    program = ctypes.c_void_p()
    text, label = source(name).encode(), name.encode()
    assert nvrtc().nvrtcCreateProgram(ctypes.byref(program), text, label, 0, None, None) == 0
    try:
        status = nvrtc().nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        )
        log = log_of(program)
    finally:
        nvrtc().nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, log
    return read(log)


def read(log: str) -> tuple[dict[str, Usage], list[str]]:
    """The usage of each kernel from ptxas' words, and all lines that are not its words."""
    kernels: dict[str, Usage] = {}
    name, spilt = "", 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilt = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[name] = Usage(int(match[1]), spilt, int(shared[1]) if shared else 0)
    usual = re.compile(r"^\s*$|ptxas info|bytes stack frame")
    return kernels, [line for line in log.splitlines() if not usual.search(line)]


needs_nvrtc = pytest.mark.skipif(
    nvrtc() is None, reason="needs NVIDIA's NVRTC: pip install 'minikd[test-cuda]' (nvidia-cuda-nvrtc-cu12)"
)


def functions(name: str, dtype: str) -> set[str]:
    """The kernels of a source that the table launches."""
    found = set()
    for step in (s for steps in KERNELS.values() for s in steps if s.source == name):
        variants = VARIANTS.get(step.function, {}) if step.grid == "classes" else {}
        of_dtype = variants.get(8 if dtype == "float64" else 4)
        found |= {f"{step.function}_{v.suffix}" for v in of_dtype} if of_dtype else {step.function}
    return found


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_compiles_without_a_warning_or_a_spilt_register(name: str, dtype: str, architecture: str) -> None:
    kernels, words = compiled(name, dtype, architecture)
    assert words == []
    assert {k: u.spilt for k, u in kernels.items() if u.spilt} == {}
    assert set(kernels) == functions(name, dtype)
    assert max(u.shared for u in kernels.values()) <= STATIC_SHARED or name == "bias.cu"


def test_the_compilers_words_are_read() -> None:
    log = (
        "kernel.cu(3): warning #177-D: unused\n\n"
        "ptxas info    : Compiling entry function 'f' for 'sm_90'\n"
        "ptxas info    : Function properties for f\n"
        "    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 384 bytes smem\n"
        "ptxas info    : Compiling entry function 'g' for 'sm_90'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 7 registers\n"
    )
    kernels, words = read(log)
    assert kernels == {"f": Usage(40, 24, 384), "g": Usage(7, 0, 0)}
    assert words == ["kernel.cu(3): warning #177-D: unused"]


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "sm_90"
    print(f"{chosen:30} {'dtype':8} registers  spilt  shared")
    for each in SOURCES:
        for real in ("float32", "float64"):
            for kernel, usage in sorted(compiled(each, real, chosen)[0].items()):
                print(f"{kernel:30} {real:8} {usage.registers:9} {usage.spilt:6} {usage.shared:7}")
