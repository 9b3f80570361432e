"""The small processors that exported C is compiled for, by Zig, which brings the linker and the run-time helpers too.

Zig comes from `pip install 'minikd[device]'`. Calling conventions: Procedure Call Standard for the Arm Architecture
(IHI 0042, section 6); RISC-V ELF psABI, chapter 2; System V ABI, MIPS supplement, chapter 3.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minikd.errors import BackendError
from minikd.export.elf import Program, read_elf
from minikd.teachers.teacher import library

__all__ = [
    "FLASH",
    "FLASH_BYTES",
    "RAM",
    "RAM_BYTES",
    "TARGETS",
    "Processor",
    "Target",
    "compile_object",
    "cross_compile",
]

FLASH, FLASH_BYTES = 0x0800_0000, 2 << 20
RAM, RAM_BYTES = 0x2000_0000, 256 << 10

STRICT = (
    *("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic-errors", "-Wconversion", "-Wsign-conversion", "-Wshadow"),
    *("-Wdouble-promotion", "-Wfloat-conversion", "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wvla"),
)
# Contraction would round once where two operations are written; no sanitizer is there to be called.
BARE = (
    *("-ffreestanding", "-ffp-contract=off", "-fno-sanitize=undefined", "-fno-unwind-tables", "-ffunction-sections"),
    "-fno-lto",  # which on MIPS forgets that floats are in software, in older versions
)


class Processor(NamedTuple):
    """How Unicorn names a processor, and where its calling convention puts things.

    family : of Unicorn's constants ("ARM").  modes : of the processor.  model : its name.
    arguments : registers of the first arguments.  result, stack, link : registers.
    home : bytes above the stack pointer that a called function may write to.
    width : bytes of the instruction that begins with these bytes.
    """

    family: str
    modes: tuple[str, ...]
    model: str
    arguments: tuple[str, ...]
    result: str
    stack: str
    link: str
    home: int
    width: Callable[[bytes], int]


def _thumb_width(code: bytes) -> int:
    return 4 if code[1] >> 3 in (0b11101, 0b11110, 0b11111) else 2


def _riscv_width(code: bytes) -> int:
    return 4 if code[0] & 3 == 3 else 2


def _mips_width(code: bytes) -> int:
    return 4


def _cortex(model: str) -> Processor:
    # With Unicorn's mode MCLASS every model would be a Cortex-M33, which runs what the smaller ones refuse.
    return Processor("ARM", ("THUMB",), f"ARM_{model}", ("R0", "R1", "R2", "R3"), "R0", "SP", "LR", 0, _thumb_width)


RISCV = Processor(
    "RISCV", ("RISCV32",), "RISCV32_SIFIVE_E31", tuple(f"A{k}" for k in range(8)), "A0", "SP", "RA", 0, _riscv_width
)
MIPS = Processor(
    "MIPS", ("MIPS32", "BIG_ENDIAN"), "MIPS32_4KC", ("A0", "A1", "A2", "A3"), "V0", "SP", "RA", 16, _mips_width
)


@dataclass(frozen=True)
class Target:
    """A processor that code is compiled for.

    triple, cpu, flags : as Zig's compiler takes them.
    room : bytes of flash.
    processor : how it is emulated; None where objects are compiled and no more.
    """

    name: str
    triple: str
    cpu: str
    processor: Processor | None = None
    flags: tuple[str, ...] = ()
    room: int = FLASH_BYTES


PLAIN_ADDRESSES = ("-mno-abicalls", "-fno-pic", "-G0")  # on MIPS: no table of addresses, no register that points to it

TARGETS = (
    Target("Cortex-M0+", "thumb-freestanding-eabi", "cortex_m0plus", _cortex("CORTEX_M0")),
    Target("Cortex-M4F", "thumb-freestanding-eabihf", "cortex_m4+vfp4d16sp", _cortex("CORTEX_M4")),
    Target("RV32IMAC", "riscv32-freestanding-none", "generic_rv32+m+a+c", RISCV),
    Target("MIPS32, big-endian", "mips-freestanding-eabi", "mips32+soft_float", MIPS, PLAIN_ADDRESSES),
    Target("ATmega328P", "avr-freestanding-none", "atmega328p", None, ("-mmcu=atmega328p",), 32 << 10),
    Target("PowerPC 750, big-endian", "powerpc-freestanding-eabi", "750"),
)


def compile_object(source: Path, target: Target, *, level: str = "-O2") -> Program:
    """One source as an object of its own, freestanding, every warning an error.

    Raises
    ------
    BackendError : Zig is missing, or does not compile it; the first of its messages is told.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "object.o"
        _zig(target, (*STRICT, *BARE, level, "-c", str(source.resolve()), "-o", str(out)))
        return read_elf(out.read_bytes(), "compile_object")


def cross_compile(sources: Sequence[Path], target: Target, functions: Sequence[str], *, level: str = "-O2") -> bytes:
    """A program of 32 bits with these functions in flash at FLASH, and what they call: bytes of an ELF file.

    functions : what will be called by name; whatever none of them reaches is left out.
    level : how far to optimise, "-O2" or "-Os".

    Raises
    ------
    BackendError : Zig is missing, or does not compile or link it; the first of its messages is told.
    """
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder) / "memory.ld", Path(folder) / "program.elf"
        script.write_text(_link_script(functions))
        # Zig drops the names of functions without -g; what else -g writes, the script throws away.
        link = (f"-Wl,-T,{script}", f"-Wl,-e,{functions[0]}", "-Wl,--gc-sections", "-g", "-o", str(out))
        _zig(target, (*STRICT, *BARE, level, *(str(source.resolve()) for source in sources), *link))
        return out.read_bytes()


def _link_script(functions: Sequence[str]) -> str:
    return f"""EXTERN({" ".join(functions)})
MEMORY {{
  flash (rx) : ORIGIN = {FLASH:#x}, LENGTH = {FLASH_BYTES:#x}
  ram (rw) : ORIGIN = {RAM:#x}, LENGTH = {RAM_BYTES:#x}
}}
SECTIONS {{
  .text : {{ *(.text .text.*) }} > flash
  .rodata : {{ *(.rodata .rodata.* .srodata .srodata.* .data.rel.ro .data.rel.ro.*) }} > flash
  .data : {{ *(.data .data.* .sdata .sdata.*) }} > ram
  .bss : {{ *(.bss .bss.* .sbss .sbss.* COMMON) }} > ram
  /DISCARD/ : {{ *(.ARM.ex* .MIPS.* .reginfo .eh_frame* .debug* .comment) }}
}}
"""


def _zig(target: Target, arguments: Sequence[str]) -> None:
    library("ziglang", "device", "cross_compile")
    command = (sys.executable, "-m", "ziglang", "cc", "-target", target.triple, f"-mcpu={target.cpu}", *target.flags)
    done = subprocess.run((*command, *arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[:10])
        raise BackendError("cross_compile", target.name, expected="a target that this C is compiled for", got=said)
