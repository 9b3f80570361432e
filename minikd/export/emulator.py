"""Exported C on devices that are not there: the program that would be flashed, run in the emulator Unicorn.

An emulated processor has flash that cannot be written, a stack with nothing below it, and every array at the end of
pages of its own: reading or writing past an array, or a stack that is too small, ends the call. What runs is the code
that would be flashed, with the compiler's own helpers (software floats, long products) and no library.

Sums, differences and products in software have the bits that IEEE 754 asks for, subnormal numbers included. So have
quotients from 2^-126 on; below, Zig's division does not round, or gives 0, as its version may be.

Unicorn comes from `pip install 'minikd[device]'`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from minikd.errors import ArgumentError, BackendError
from minikd.export.elf import read_elf
from minikd.export.targets import FLASH, FLASH_BYTES, RAM, RAM_BYTES, TARGETS, Target
from minikd.teachers.teacher import library

__all__ = ["Answer", "Device"]

STACK, STACK_BYTES = 0x2800_0000, 64 << 10
END = 0x2A00_0000  # where a called function returns to
ARRAYS = 0x3000_0000
PAGE = 4096
PAINT = 0xA5A5_A5A5  # what the stack is filled with before a call


class Answer(NamedTuple):
    """What a call gave back, how many instructions it took, and how much of the stack, its arguments included."""

    value: int
    instructions: int
    stack_bytes: int


class Device:
    """An emulated processor with a program in its flash.

    program : of cross_compile, for this target.
    at_most : how many instructions a call may take before it counts as one that never ends.

    Raises
    ------
    ArgumentError : the target is not emulated.
    BackendError : Unicorn is missing.
    """

    def __init__(self, program: bytes, target: Target, *, at_most: int = 1_000_000_000) -> None:
        if target.processor is None:
            names = ", ".join(t.name for t in TARGETS if t.processor)
            raise ArgumentError("Device", "target", expected=f"one that is emulated ({names})", got=target.name)
        self.program = read_elf(program, "Device")
        self._order: Literal["<", ">"] = ">" if self.program.big_endian else "<"
        self._target, self._processor, self._at_most = target, target.processor, at_most
        self._unicorn = library("unicorn", "device", "Device")
        self._constants = library(f"unicorn.{self._processor.family.lower()}_const", "device", "Device")
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
        machine.ctl_set_cpu_model(getattr(self._constants, f"UC_CPU_{processor.model}"))
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
        machine.mem_write(STACK, PAINT.to_bytes(4, "little") * (STACK_BYTES // 4))
        spilled = words[len(processor.arguments) :]
        top = (STACK + STACK_BYTES - processor.home - 4 * len(spilled)) & ~15
        for k, word in enumerate(spilled):
            machine.mem_write(top + processor.home + 4 * k, struct.pack(self._order + "I", word & 0xFFFF_FFFF))
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
        if self._instructions > self._at_most:
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
        return array.astype(array.dtype.newbyteorder(self._order))
