"""Builds the C kernels into minikd._native, and puts headers beside the CUDA sources; all else is in pyproject.toml.

Without a C compiler the package still installs and runs on its other backends; the reason is then kept beside the
package and shown by `minikd.backends()`. With MINIKD_REQUIRE_C=1 a failed build is an error.
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path

from cffi import FFI
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

CSRC = Path("csrc")
REASON = Path("minikd", "native_build_failure.txt")
LIMITED_API = platform.python_implementation() == "CPython" and not sysconfig.get_config_var("Py_GIL_DISABLED")

# What each level of instructions may use beyond the compiler's baseline; kernels.c is compiled once for each.
LEVELS: dict[str, list[str]] = {
    "base": [],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
NUMBERS: dict[str, list[tuple[str, str | None]]] = {"float": [], "double": [("MINIKD_DOUBLE", None)]}

# No -ffast-math: infinities and NaN are results here. The rest lets the compiler forget errno and signalling NaN.
STRICT = ["-std=c99", "-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"]
SIMD = ["-fopenmp-simd", "-DMINIKD_SIMD"]
# Peeling rounds off a loop until its array is aligned would let a sum depend on where the array lies.
NO_PEELING = ["--param=vect-max-peeling-for-alignment=0"]

# The headers of the C kernels that the CUDA sources include, whose text is needed when these are compiled.
CUDA = Path("minikd", "kernels", "cuda")
SHARED_HEADERS = ("elements.h", "real.h")

FAILURES = (BaseError, CCompilerError, OSError)


def declarations() -> str:
    """csrc/kernels.h as cffi reads it: without its preprocessor lines."""
    lines = (CSRC / "kernels.h").read_text("utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


class BuildPython(build_py):
    """Copies the package, and the shared headers into it: in a checkout they are found where they are."""

    def run(self) -> None:
        super().run()
        for header in () if self.editable_mode else SHARED_HEADERS:
            folder = Path(self.build_lib, CUDA)
            folder.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(CSRC / header), str(folder / header))


class BuildKernels(build_ext):
    """Compiles kernels.c for every level and number type, and links them with what cffi generates."""

    def run(self) -> None:
        outputs = [Path(self.build_lib)]
        if self.inplace or getattr(self, "editable_mode", False):
            outputs.append(Path())
        for folder in outputs:
            (folder / REASON).unlink(missing_ok=True)
        try:
            super().run()
        except FAILURES as error:
            if os.environ.get("MINIKD_REQUIRE_C") == "1":
                raise
            reason = explanation(error)
            print(f"warning: minikd is built without its C kernels: {reason}", file=sys.stderr)
            for folder in outputs:
                for ext in self.extensions:  # an older module would be kernels of another source
                    (folder / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
                (folder / REASON).parent.mkdir(parents=True, exist_ok=True)
                (folder / REASON).write_text(reason + "\n", "utf-8")
            self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        unix = self.compiler.compiler_type != "msvc"
        options = STRICT if unix else ["/O2", "/std:c11", "/fp:precise"]
        options = options + [o for group in (SIMD, NO_PEELING) if unix and self.accepts(group) for o in group]
        generated = Path(self.build_temp, "_native.c")
        generated.parent.mkdir(parents=True, exist_ok=True)
        ffi = FFI()
        ffi.cdef(declarations())
        ffi.set_source("minikd._native", '#include "kernels.h"')
        ffi.emit_c_code(str(generated))

        usable = {name: flags for name, flags in LEVELS.items() if not flags or (unix and self.accepts(flags))}
        for level, flags in usable.items():
            for number, macros in NUMBERS.items():
                ext.extra_objects += self.compiler.compile(
                    [str(CSRC / "kernels.c")],
                    output_dir=str(Path(self.build_temp, f"{level}_{number}")),
                    macros=[*macros, ("MINIKD_TABLE", f"minikd_{level}_{number}")],
                    include_dirs=[str(CSRC)],
                    extra_postargs=options + flags,
                    depends=ext.depends,
                )
        ext.sources = [str(generated), *ext.sources]
        ext.define_macros += [(f"MINIKD_{level.upper()}", None) for level in usable if level != "base"]
        ext.extra_link_args += ["-pthread"] if unix else []  # a no-op where the C library holds them itself
        ext.extra_compile_args = [o for o in options if o not in ("-Wextra", *SIMD, *NO_PEELING)]
        super().build_extension(ext)

    def accepts(self, flags: list[str]) -> bool:
        """Whether the compiler takes these options without an error."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "accepts.c")
            source.write_text("int accepts;\n", "utf-8")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-Werror", *flags])
            except FAILURES:
                return False
        return True


def explanation(error: BaseException) -> str:
    """What is missing and how to mend it, in sentences."""
    cause = " ".join(str(error).split())
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = "the C headers of Python (Python.h) are not installed"
    else:
        missing = "the C compiler is not installed or does not work"
    fix = "install them (on Debian or Ubuntu: apt install gcc python3-dev), then reinstall minikd"
    return f"{missing}; {fix}. The build said: {cause}"


native = Extension(
    "minikd._native",
    sources=[str(CSRC / name) for name in ("blas.c", "dispatch.c", "memory.c", "parallel.c")],
    include_dirs=[str(CSRC)],
    depends=[str(path) for path in sorted(CSRC.glob("*.[ch]"))],
    py_limited_api=LIMITED_API,
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if LIMITED_API else [],
)

if __name__ == "__main__":  # its options are also read by a test
    setup(
        ext_modules=[native],
        cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED_API else {},
    )
