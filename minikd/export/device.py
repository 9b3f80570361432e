"""Exported C on devices that are not there: compiled for small processors by Zig, and run in the emulator Unicorn.

An emulated processor has flash that cannot be written, a stack with nothing below it, and every array at the end of
pages of its own: reading or writing past an array, or a stack that is too small, ends the call. What runs is the code
that would be flashed, with the compiler's own helpers (software floats, long products) and no library.

Both programs come from `pip install 'minikd[device]'`. Calling conventions: Procedure Call Standard for the Arm
Architecture (IHI 0042, section 6); RISC-V ELF psABI, chapter 2; System V ABI, MIPS supplement, chapter 3.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import ArgumentError, BackendError
from minikd.export.elf import Program, read_elf
from minikd.teachers.teacher import library

__all__ = ["TARGETS", "Answer", "Device", "Target", "compile_object", "cross_compile"]

FLASH, FLASH_BYTES = 0x0800_0000, 2 << 20
RAM, RAM_BYTES = 0x2000_0000, 256 << 10
STACK, STACK_BYTES = 0x2800_0000, 64 << 10
END = 0x2A00_0000  # where a called function returns to
ARRAYS = 0x3000_0000
PAGE = 4096
PAINT = 0xA5A5_A5A5  # what the stack is filled with before a call
INSTRUCTIONS_AT_MOST = 2_000_000_000

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic-errors", "-Wconversion", "-Wdouble-promotion")
# Contraction would round once where two operations are written; no sanitizer is there to be called.
BARE = ("-ffreestanding", "-ffp-contract=off", "-fno-sanitize=undefined", "-fno-unwind-tables", "-ffunction-sections")


class Processor(NamedTuple):
    """How Unicorn names a processor, and where its calling convention puts things.

    family : of Unicorn's constants ("ARM").  modes : of the processor.  model : its name, or "" for the usual one.
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
    return Processor("ARM", ("THUMB", "MCLASS"), model, ("R0", "R1", "R2", "R3"), "R0", "SP", "LR", 0, _thumb_width)


RISCV = Processor("RISCV", ("RISCV32",), "", tuple(f"A{k}" for k in range(8)), "A0", "SP", "RA", 0, _riscv_width)
MIPS = Processor("MIPS", ("MIPS32", "BIG_ENDIAN"), "", ("A0", "A1", "A2", "A3"), "V0", "SP", "RA", 16, _mips_width)


@dataclass(frozen=True)
class Target:
    """A processor that code is compiled for.

    triple, cpu, flags : as Zig's compiler takes them.
    processor : how it is emulated; None where objects are compiled and no more.
    """

    name: str
    triple: str
    cpu: str
    processor: Processor | None = None
    flags: tuple[str, ...] = ()


TARGETS = (
    Target("Cortex-M0+", "thumb-freestanding-eabi", "cortex_m0plus", _cortex("CORTEX_M0")),
    Target("Cortex-M4F", "thumb-freestanding-eabihf", "cortex_m4+vfp4d16sp", _cortex("CORTEX_M4")),
    Target("RV32IMAC", "riscv32-freestanding-none", "generic_rv32+m+a+c", RISCV),
    Target(
        "MIPS32, big-endian", "mips-freestanding-eabi", "mips32+soft_float", MIPS, ("-mno-abicalls", "-fno-pic", "-G0")
    ),
    Target("ATmega328P", "avr-freestanding-none", "atmega328p", None, ("-mmcu=atmega328p",)),
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
  .rodata : {{ *(.rodata .rodata.* .srodata .srodata.*) }} > flash
  .data : {{ *(.data .data.* .sdata .sdata.*) }} > ram
  .bss : {{ *(.bss .bss.* .sbss .sbss.* COMMON) }} > ram
  /DISCARD/ : {{ *(.ARM.ex* .eh_frame* .debug* .comment) }}
}}
"""


def _zig(target: Target, arguments: Sequence[str]) -> None:
    library("ziglang", "device")
    command = (sys.executable, "-m", "ziglang", "cc", "-target", target.triple, f"-mcpu={target.cpu}", *target.flags)
    done = subprocess.run((*command, *arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[:10])
        raise BackendError("cross_compile", target.name, expected="a target that this C is compiled for", got=said)


class Answer(NamedTuple):
    """What a call gave back, how many instructions it took, and how many bytes of the stack it wrote to."""

    value: int
    instructions: int
    stack_bytes: int


class Device:
    """An emulated processor with a program in its flash.

    program : of cross_compile, for this target.

    Raises
    ------
    ArgumentError : the target is not emulated.
    BackendError : Unicorn is missing.
    """

    def __init__(self, program: bytes, target: Target) -> None:
        if target.processor is None:
            names = ", ".join(t.name for t in TARGETS if t.processor)
            raise ArgumentError("Device", "target", expected=f"one that is emulated ({names})", got=target.name)
        self.program = read_elf(program, "Device")
        self._target, self._processor = target, target.processor
        self._unicorn = library("unicorn", "device")
        self._constants = library(f"unicorn.{self._processor.family.lower()}_const", "device")
        self._machine = self._start()
        self._widths: dict[tuple[int, int], int] = {}  # instructions of the stretches of code that ran
        self._instructions = 0
        self._placed: tuple[int, ...] = ()  # the sizes that memory for arrays is laid out for

    def call(self, function: str, *arguments: int | np.ndarray) -> Answer:
        """Call a C function that returns an int; arrays are passed as pointers, and hold what it wrote afterwards.

        arguments : integers of up to 32 bits, and contiguous arrays of the C types' dtypes, in this machine's order of
            bytes. Each call finds variables as the call before left them.

        Raises
        ------
        ArgumentError : there is no such function.
        BackendError : the code read, wrote or ran where nothing is, or did not come to an end.
        """
        symbol = self.program.symbols.get(function)
        if symbol is None or symbol.undefined:
            raise ArgumentError("Device.call", "function", expected="in the program", got=function)
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        places = self._place([a.nbytes for a in arrays])
        for place, array in zip(places, arrays, strict=True):
            self._machine.mem_write(place, self._swapped(array).tobytes())
        pointers = iter(places)
        words = [next(pointers) if isinstance(a, np.ndarray) else a for a in arguments]
        value = self._run(symbol.address, words)
        for place, array in zip(places, arrays, strict=True):
            if array.flags.writeable:
                read = bytes(self._machine.mem_read(place, array.nbytes))
                array[...] = np.frombuffer(read, self._swapped(array).dtype).reshape(array.shape)
        return Answer(value, self._instructions, self._stack_bytes())

    def _start(self) -> Any:
        uc, processor = self._unicorn, self._processor
        mode = sum(getattr(uc, f"UC_MODE_{name}") for name in processor.modes)
        machine = uc.Uc(getattr(uc, f"UC_ARCH_{processor.family}"), mode)
        if processor.model:
            machine.ctl_set_cpu_model(getattr(self._constants, f"UC_CPU_{processor.family}_{processor.model}"))
        executable = uc.UC_PROT_READ | uc.UC_PROT_EXEC
        machine.mem_map(FLASH, FLASH_BYTES, executable)
        machine.mem_map(RAM, RAM_BYTES, uc.UC_PROT_READ | uc.UC_PROT_WRITE)
        machine.mem_map(STACK, STACK_BYTES, uc.UC_PROT_READ | uc.UC_PROT_WRITE)
        machine.mem_map(END, PAGE, executable)
        for section in self.program.sections:  # what start-up code does: variables get their first values
            machine.mem_write(section.address, section.content or bytes(section.size))
        machine.hook_add(uc.UC_HOOK_BLOCK, self._count)
        return machine

    def _register(self, name: str) -> int:
        return int(getattr(self._constants, f"UC_{self._processor.family}_REG_{name}"))

    def _place(self, sizes: Sequence[int]) -> list[int]:
        """Addresses of arrays of these sizes, each ending where its pages end, with a page of nothing in between."""
        places, page = [], ARRAYS
        fresh = tuple(sizes) != self._placed
        if fresh:
            for start, end, _ in list(self._machine.mem_regions()):
                if start >= ARRAYS:
                    self._machine.mem_unmap(start, end + 1 - start)
            self._placed = tuple(sizes)
        for size in sizes:
            pages = max(1, math.ceil(size / PAGE)) * PAGE
            if fresh:
                self._machine.mem_map(page, pages, self._unicorn.UC_PROT_READ | self._unicorn.UC_PROT_WRITE)
            places.append(page + pages - size)
            page += pages + PAGE
        return places

    def _run(self, address: int, words: Sequence[int]) -> int:
        machine, processor = self._machine, self._processor
        order = "big" if self.program.big_endian else "little"
        machine.mem_write(STACK, PAINT.to_bytes(4, "little") * (STACK_BYTES // 4))
        spilled = words[len(processor.arguments) :]
        top = (STACK + STACK_BYTES - processor.home - 4 * len(spilled)) & ~15
        for k, word in enumerate(spilled):
            machine.mem_write(top + processor.home + 4 * k, (word & 0xFFFF_FFFF).to_bytes(4, order))
        for register, word in zip(processor.arguments, words, strict=False):
            machine.reg_write(self._register(register), word & 0xFFFF_FFFF)
        machine.reg_write(self._register(processor.stack), top)
        machine.reg_write(self._register(processor.link), END | (address & 1))  # bit 0 says Thumb
        self._instructions = 0
        try:
            machine.emu_start(address, END)
        except self._unicorn.UcError as error:
            raise self._stopped(str(error)) from error
        at = machine.reg_read(self._register("PC"))
        if at != END:
            raise self._stopped(f"none after {self._instructions} instructions")
        value = int(machine.reg_read(self._register(processor.result))) & 0xFFFF_FFFF
        return value - (value >> 31 << 32)

    def _count(self, machine: Any, address: int, size: int, data: object) -> None:
        """Before each stretch of code without a jump: add its instructions."""
        known = self._widths.get((address, size))
        if known is None:
            code, at, known = bytes(machine.mem_read(address, size)), 0, 0
            while at < size:
                at += self._processor.width(code[at:])
                known += 1
            self._widths[address, size] = known
        self._instructions += known
        if self._instructions > INSTRUCTIONS_AT_MOST:
            machine.emu_stop()

    def _stopped(self, got: str) -> BackendError:
        at = self._machine.reg_read(self._register("PC"))
        expected = "code that returns and keeps to its own memory"
        return BackendError("Device.call", f"{self._target.name} at {at:#x}", expected=expected, got=got)

    def _stack_bytes(self) -> int:
        words = np.frombuffer(bytes(self._machine.mem_read(STACK, STACK_BYTES)), "<u4")
        touched = np.flatnonzero(words != PAINT)
        return STACK_BYTES - 4 * int(touched[0]) if len(touched) else 0

    def _swapped(self, array: np.ndarray) -> np.ndarray:
        return array.astype(array.dtype.newbyteorder(">" if self.program.big_endian else "<"))
