"""What an ELF file of 32 bits holds, of either byte order: its sections, its symbols, and how much memory they take.

Source: Tool Interface Standard, Executable and Linking Format, version 1.2 (1995).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from minikd.errors import ModelFormatError

__all__ = ["Program", "Section", "Symbol", "read_elf"]

SYMBOL_TABLE, NO_BITS = 2, 8  # kinds of sections: SHT_SYMTAB, SHT_NOBITS
WRITABLE, IN_MEMORY = 1, 2  # flags of sections: SHF_WRITE, SHF_ALLOC
CONSTANT_ADDRESSES = ".data.rel.ro"
UNDEFINED = 0  # the section of a symbol that another file must bring: SHN_UNDEF


class Section(NamedTuple):
    """A stretch of bytes: where it lies in memory, its flags, its size, and what it begins with (b"" for zeros)."""

    name: str
    address: int
    flags: int
    size: int
    content: bytes

    @property
    def is_variable(self) -> bool:
        """Whether a program writes to it; constants that hold addresses only look so until it is linked."""
        return bool(self.flags & WRITABLE) and not self.name.startswith(CONSTANT_ADDRESSES)


class Symbol(NamedTuple):
    """A name: its address, and whether another file must bring it."""

    address: int
    undefined: bool


@dataclass(frozen=True)
class Program:
    """The sections that lie in memory, and the named addresses.

    big_endian : whether the most significant byte comes first.
    """

    big_endian: bool
    sections: tuple[Section, ...]
    symbols: dict[str, Symbol]

    @property
    def flash_bytes(self) -> int:
        """Code, constants, and the first values of variables."""
        return sum(len(section.content) for section in self.sections)

    @property
    def static_bytes(self) -> int:
        """Variables, with and without first values: memory that is taken all the time."""
        return sum(section.size for section in self.sections if section.is_variable)

    @property
    def undefined(self) -> list[str]:
        """Names that another file must bring, sorted."""
        return sorted(name for name, symbol in self.symbols.items() if symbol.undefined)


def read_elf(data: bytes, where: str = "read_elf") -> Program:
    """The program or object in these bytes.

    Raises
    ------
    ModelFormatError : they are no ELF file of 32 bits, or are cut short.
    """
    if data[:5] != b"\x7fELF\x01" or data[5:6] not in (b"\x01", b"\x02"):
        raise _refuse(where, repr(data[:6]))
    order = "<" if data[5] == 1 else ">"
    try:
        return _read(data, order)
    except (struct.error, IndexError, ValueError) as error:
        raise _refuse(where, f"a damaged one ({error})") from error


def _read(data: bytes, order: str) -> Program:
    (start,) = struct.unpack_from(f"{order}I", data, 32)
    size, count, names = struct.unpack_from(f"{order}3H", data, 46)
    headers = [struct.unpack_from(f"{order}10I", data, start + size * k) for k in range(count)]
    sections, symbols = [], {}
    for name, kind, flags, address, offset, length, link, *_ in headers:
        if kind == SYMBOL_TABLE:
            symbols = _symbols(data, order, offset, length, headers[link][4])
        elif flags & IN_MEMORY:
            content = b"" if kind == NO_BITS else data[offset : offset + length]
            if kind != NO_BITS and len(content) < length:
                raise ValueError(f"{length} bytes at {offset} go past the end")
            sections.append(Section(_text(data, headers[names][4] + name), address, flags, length, content))
    return Program(order == ">", tuple(sections), symbols)


def _symbols(data: bytes, order: str, offset: int, length: int, texts: int) -> dict[str, Symbol]:
    found = {}
    for entry in range(offset, offset + length, 16):
        name, address, _, _, _, section = struct.unpack_from(f"{order}3I2BH", data, entry)
        if name:
            found[_text(data, texts + name)] = Symbol(address, section == UNDEFINED)
    return found


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode(errors="replace")


def _refuse(where: str, got: str) -> ModelFormatError:
    return ModelFormatError(where, "data", expected="an ELF file of 32 bits", got=got)
