"""A record of fixed size that a rank shows to all others: a frozen dataclass of integers and short texts."""

from __future__ import annotations

import struct
from dataclasses import Field, astuple, dataclass, field, fields
from typing import Any, TypeVar

_KEY = "fact"
_CUT = b"..."

AnyRecord = TypeVar("AnyRecord", bound="Record")


@dataclass(frozen=True)
class Fact:
    """What a field of a record is to its readers.

    Attributes:
        title: The column's head in a table.
        text_bytes: Room for a text, in UTF-8; 0 is an unsigned 64-bit integer.
        remedy: What to do where ranks differ; "" for what may differ.
        beside: Fields that help to see why ranks differ in this one.
    """

    title: str
    text_bytes: int = 0
    remedy: str = ""
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """The base of records: fields are declared with `compared` and `reported`, in the order of their bytes."""

    @classmethod
    def facts(cls) -> dict[str, Fact]:
        """Every field's meaning, by name."""
        return {entry.name: _fact(entry) for entry in fields(cls)}

    @classmethod
    def layout(cls) -> struct.Struct:
        """The bytes: little-endian, without gaps."""
        return struct.Struct("<" + "".join(f"{f.text_bytes}s" if f.text_bytes else "Q" for f in cls.facts().values()))

    def encode(self) -> bytes:
        """The record's bytes, equally many for all records of a class; of too long a text the end is kept."""
        rooms = [fact.text_bytes for fact in self.facts().values()]
        values = [_cut(value, room) if room else value for value, room in zip(astuple(self), rooms, strict=True)]
        return self.layout().pack(*values)

    @classmethod
    def decode(cls: type[AnyRecord], data: bytes) -> AnyRecord:
        """The inverse of `encode`."""
        values = cls.layout().unpack(data)
        return cls(*(v.rstrip(b"\0").decode(errors="replace") if isinstance(v, bytes) else v for v in values))

    def show(self, name: str) -> str:
        """A field's value for a table."""
        value = getattr(self, name)
        return show_bytes(value) if name.endswith("_bytes") else str(value)


def compared(title: str, text_bytes: int, remedy: str, beside: tuple[str, ...] = ()) -> Any:
    """A field of a record in which all ranks must be equal."""
    return field(metadata={_KEY: Fact(title, text_bytes, remedy, beside)})


def reported(title: str, text_bytes: int = 0) -> Any:
    """A field of a record in which ranks may differ."""
    return field(metadata={_KEY: Fact(title, text_bytes)})


def show_bytes(count: int) -> str:
    """Bytes in words: "17.3 GB", "0.4 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _fact(entry: Field[Any]) -> Fact:
    fact: Fact = entry.metadata[_KEY]
    return fact


def _cut(text: str, room: int) -> bytes:
    data = text.encode(errors="replace")
    return data if len(data) <= room else _CUT + data[len(data) - room + len(_CUT) :]
