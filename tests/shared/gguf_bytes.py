"""GGUF files taken apart and put together again byte by byte, with whatever somebody may want to write into them."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Callable, Iterator

# Kind of value → how `struct` writes it.
LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
SIZES = {kind: struct.calcsize(f"<{letter}") for kind, letter in LETTERS.items()}
TEXT, LIST = 8, 9


@dataclasses.dataclass
class Tensor:
    name: bytes
    shape: list[int]
    kind: int
    offset: int


@dataclasses.dataclass
class File:
    """A file's parts: keys with the kind and the bytes of each value, tensors, and all numbers."""

    keys: list[tuple[bytes, int, bytes]]
    tensors: list[Tensor]
    data: bytes
    counts: tuple[int, int] | None = None  # of tensors and keys, instead of the true ones

    def copy(self) -> File:
        tensors = [dataclasses.replace(tensor, shape=list(tensor.shape)) for tensor in self.tensors]
        return File(list(self.keys), tensors, self.data, self.counts)

    def bytes(self) -> bytes:
        n_tensors, n_keys = self.counts or (len(self.tensors), len(self.keys))
        parts = [b"GGUF", struct.pack("<IQQ", 3, n_tensors, n_keys)]
        for name, kind, value in self.keys:
            parts += [text(name), struct.pack("<I", kind), value]
        for tensor in self.tensors:
            parts += [text(tensor.name), struct.pack("<I", len(tensor.shape))]
            parts += [struct.pack("<Q", n) for n in tensor.shape]
            parts.append(struct.pack("<IQ", tensor.kind, tensor.offset))
        head = b"".join(parts)
        return head + bytes(-len(head) % 32) + self.data


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def taken_apart(data: bytes) -> File:
    """The parts of a whole file."""
    place = 4

    def number(letter: str) -> int:
        nonlocal place
        place += struct.calcsize(f"<{letter}")
        return struct.unpack_from(f"<{letter}", data, place - struct.calcsize(f"<{letter}"))[0]

    def name() -> bytes:
        nonlocal place
        n = number("Q")
        place += n
        return data[place - n : place]

    def skip(kind: int) -> None:
        nonlocal place
        if kind == TEXT:
            name()
        elif kind == LIST:
            inner, n = number("I"), number("Q")
            for _ in range(n):
                skip(inner)
        else:
            place += SIZES[kind]

    number("I")
    n_tensors, n_keys = number("Q"), number("Q")
    keys = []
    for _ in range(n_keys):
        key, kind, start = name(), number("I"), place
        skip(kind)
        keys.append((key, kind, data[start:place]))
    tensors = []
    for _ in range(n_tensors):
        key = name()
        shape = [number("Q") for _ in range(number("I"))]
        tensors.append(Tensor(key, shape, number("I"), number("Q")))
    return File(keys, tensors, data[-(-place // 32) * 32 :])


COUNTS = (0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -1.0, 1e-38, 1e38, float("inf"), float("-inf"), float("nan"))


def _value(rng: random.Random) -> tuple[int, bytes]:
    """A value of any kind."""
    kind = rng.choice([*LETTERS, TEXT, LIST, 13, 2**32 - 1])
    if kind == TEXT:
        return kind, text(rng.choice([b"", b"x", b"\xff\xfe", b"\x1b[2J\nline", b"yarn", b"9" * 5000]))
    if kind == LIST:
        inner = rng.choice([*LETTERS, TEXT, LIST])
        n = rng.choice([0, 1, 2, 3, 5, 2**31, 2**61, 2**64 - 1])
        return kind, struct.pack("<IQ", inner, n) + bytes(rng.choice([0, 8, 64]))
    letter = LETTERS.get(kind, "I")
    if letter in "fd":
        return kind, struct.pack(f"<{letter}", rng.choice(FLOATS))
    bits = 8 * struct.calcsize(f"<{letter}")
    n = rng.choice(COUNTS) % 2**bits
    return kind, n.to_bytes(bits // 8, "little")


def cut(file: File, rng: random.Random) -> bytes:
    data = file.bytes()
    head = len(data) - len(file.data)
    return data[: rng.randrange(head if rng.random() < 0.7 else len(data))]


def flipped(file: File, rng: random.Random) -> bytes:
    data = bytearray(file.bytes())
    head = len(data) - len(file.data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(head if rng.random() < 0.9 else len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def lying_count(file: File, rng: random.Random) -> bytes:
    """A count, a length, a size or an offset is another, in place: everything after it is read in another way."""
    data = bytearray(file.bytes())
    head = len(data) - len(file.data)
    place = rng.choice([8, 16, 24, rng.randrange(8, head - 8), rng.randrange(8, head - 8)])
    data[place : place + 8] = struct.pack("<Q", rng.choice(COUNTS))
    return bytes(data)


def other_value(file: File, rng: random.Random) -> bytes:
    """One or two of the architecture's keys have other values, of any kind."""
    for _ in range(rng.choice([1, 1, 2])):
        i = rng.choice([i for i, key in enumerate(file.keys) if not key[0].startswith(b"tokenizer.")])
        name, kind, value = file.keys[i]
        if kind in LETTERS and rng.random() < 0.6:  # of the same kind
            letter = LETTERS[kind]
            number = rng.choice(FLOATS) if letter in "fd" else rng.choice(COUNTS) % 2 ** (8 * len(value))
            value = struct.pack(f"<{letter}", number) if letter in "fd" else number.to_bytes(len(value), "little")
        else:
            kind, value = _value(rng)
        file.keys[i] = (name, kind, value)
    return file.bytes()


def other_keys(file: File, rng: random.Random) -> bytes:
    """A key is there twice, is missing, has another name, or there is one more."""
    i = rng.randrange(len(file.keys))
    prefix = next(value for name, _, value in file.keys if name == b"general.architecture")[8:]
    more = [b"general.alignment", *(prefix + b"." + name for name in MORE)]
    how = rng.randrange(4)
    if how == 0:
        file.keys.insert(rng.randrange(len(file.keys)), file.keys[i])
    elif how == 1:
        del file.keys[i]
    elif how == 2:
        file.keys[i] = (rng.choice([b"", b"\x00", b"\xff", b"\x1b[2J"]) + file.keys[i][0], *file.keys[i][1:])
    else:
        file.keys.append((rng.choice(more), *_value(rng)))
    return file.bytes()


MORE = (b"rope.scaling.type", b"rope.scaling.factor", b"attention.sliding_window", b"expert_count", b"vocab_size")
MORE += (b"attention.key_length", b"attention.head_count_kv", b"rope.dimension_count", b"rescale_every_n_layers")


def other_tensor(file: File, rng: random.Random) -> bytes:
    """A tensor of another shape, of another kind, elsewhere, of another name, twice, or missing."""
    i = rng.randrange(len(file.tensors))
    tensor, other = file.tensors[i], rng.choice(file.tensors)
    how = rng.randrange(8)
    if how == 0:
        tensor.shape = rng.choice([[], [0], tensor.shape[::-1], tensor.shape * 2, [1, *tensor.shape], [2**32, 2**32]])
    elif how == 1:
        tensor.shape[rng.randrange(len(tensor.shape))] = rng.choice(COUNTS)
    elif how == 2:
        tensor.kind = rng.choice([*range(42), 2**31, 2**32 - 1])
    elif how == 3:
        tensor.offset = rng.choice([other.offset, tensor.offset + 1, tensor.offset + 32, len(file.data), *COUNTS])
    elif how == 4:
        tensor.name = rng.choice([other.name, b"", b"blk.99.attn_q.weight", b"x\n\x1b[2J", b"blk.9" + b"9" * 5000])
    elif how == 5:
        file.tensors.append(dataclasses.replace(tensor, name=tensor.name + rng.choice([b"", b".scale", b"2"])))
    elif how == 6:
        del file.tensors[i]
    else:  # two tensors change places
        tensor.offset, other.offset = other.offset, tensor.offset
    return file.bytes()


def other_numbers(file: File, rng: random.Random) -> bytes:
    """NaN, infinite and random numbers and scales."""
    data = bytearray(file.data)
    tensor = rng.choice(file.tensors)
    filling = rng.choice([b"\x00\x7e", b"\x00\x7c", b"\xff\xff", b"\x00\x00\xc0\x7f", rng.randbytes(64)])
    place = tensor.offset + rng.choice([0, 2, 34])
    n = rng.choice([1, 16]) * len(filling)
    data[place : place + n] = (filling * 16)[:n]
    file.data = bytes(data)[: len(file.data)]
    return file.bytes()


DAMAGES: tuple[Callable[[File, random.Random], bytes], ...] = (
    cut,
    flipped,
    lying_count,
    other_value,
    other_keys,
    other_tensor,
    other_numbers,
)


def damaged(data: bytes, n: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Files that differ from one, with the name of what was done to each."""
    whole, rng = taken_apart(data), random.Random(seed)
    for i in range(n):
        damage = DAMAGES[i % len(DAMAGES)]
        yield damage.__name__, damage(whole.copy(), rng)
