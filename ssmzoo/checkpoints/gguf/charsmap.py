"""SentencePiece's maps of characters: which runs of bytes a text's normalisation replaces, and by what.

A map is the length of a trie in bytes, the trie, and the replacements, each with a zero at its end. The trie is a
double array of 32-bit units. From a unit, the offset to its children's block is in bits 10 to 30 (times 256 if bit 9 is
set); XOR with a byte gives that child, which holds the byte in its lowest eight bits. Bit 8 says that a run may end
here; then the block's first unit holds the place of its replacement.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

ENDS, BLOCK = 1 << 8, 256
# All that Unicode calls white space.
WHITESPACE = [chr(code) for code in (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029)]
WHITESPACE += ["\u202f", "\u205f", "\u3000"]


def charsmap(replacements: Mapping[str, str]) -> bytes:
    """The map that replaces some runs of characters, the longest one at each place."""
    texts: dict[str, int] = {}
    written = b""
    for text in replacements.values():
        if text not in texts:
            texts[text] = len(written)
            written += text.encode() + b"\0"
    trie: dict[int, dict] = {}
    for run, text in replacements.items():
        node = trie
        for byte in run.encode():
            node = node.setdefault(byte, {})
        node[0] = {"value": texts[text]}  # no text has a zero in it
    units = [0] * BLOCK
    _place(trie, 0, units)
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + written


def _place(node: Mapping[int, dict], at: int, units: list[int]) -> None:
    """Gives a node's children a block of their own, and fills in the units of both."""
    block = len(units)
    units += [0] * BLOCK
    units[at] |= (at ^ block) << 10
    for byte, child in node.items():
        if byte == 0:
            units[at] |= ENDS
            units[block] = child["value"] | 1 << 31
        else:
            units[block + byte] = byte
            _place(child, block + byte, units)


def normalized(data: bytes, text: str) -> str:
    """A text with the longest run at each place replaced, as llama.cpp does it.

    Raises:
        ValueError: the map is damaged.
    """
    (size,) = struct.unpack_from("<I", data) if len(data) >= 4 else (0,)
    if size < 4 or size % 4 or 4 + size >= len(data):
        raise ValueError("`precompiled_charsmap` must have a trie and replacements")
    units, replacements = struct.unpack_from(f"<{size // 4}I", data, 4), data[4 + size :]
    given, made, place = text.encode(), b"", 0
    try:
        while place < len(given):
            run, found = _longest(units, given, place)
            if run:
                made += replacements[found : replacements.index(b"\0", found)]
            else:
                run = next(n for n in range(1, 5) if place + n == len(given) or given[place + n] & 0xC0 != 0x80)
                made += given[place : place + run]
            place += run
        return made.decode()
    except (IndexError, ValueError):
        raise ValueError("`precompiled_charsmap` must have its places within its trie and replacements") from None


def _longest(units: tuple[int, ...], given: bytes, place: int) -> tuple[int, int]:
    """How many bytes from a place on are replaced, and where their replacement is."""
    at, best = _offset(units[0]), (0, 0)
    for i in range(place, len(given)):
        at ^= given[i]
        unit = units[at]
        if unit & (1 << 31 | 0xFF) != given[i]:
            break
        at ^= _offset(unit)
        if unit & ENDS:
            best = i - place + 1, units[at] & ~(1 << 31)
    return best


def _offset(unit: int) -> int:
    """To a unit's children."""
    return unit >> 10 << ((unit & 1 << 9) >> 6)
