"""How many lengths a page of Parquet says that it holds, where texts are written as differences.

In the encodings DELTA_LENGTH_BYTE_ARRAY and DELTA_BYTE_ARRAY a page begins with lengths, and with the number of them:
whoever reads it makes room for as many at once. Since differences of zero take no space, a few bytes can stand for any
number of lengths, so the number has to be one that the page's header allows (parquet-format's Encodings.md).
"""

from __future__ import annotations

from ssmzoo.train.corpora.pages import Damaged

DELTA_LENGTH, DELTA_BYTES = 6, 7
BLOCK, MINIBLOCK = 128, 32  # values of a block and of a part of it are multiples of these
WIDEST = 64  # bits of a difference


def check_lengths(content: memoryview, encoding: int, values: int) -> None:
    """Whether a page holds no more lengths than values.

    Args:
        content: of the page, after its levels.
        encoding: ``DELTA_LENGTH``, which has lengths, or ``DELTA_BYTES``, which has those of beginnings before them.
        values: of the page, by its header.

    Raises:
        Damaged: it says that it has more, or it is damaged.
    """
    if not len(content):  # of nulls alone
        return
    try:
        after = _passed(content, 0, values, encoding == DELTA_BYTES)
        if encoding == DELTA_BYTES:
            _passed(content, after, values, False)
    except IndexError:
        raise Damaged("a page ends amid its lengths") from None


def _passed(content: memoryview, at: int, values: int, on: bool) -> int:
    """Checks the head of a sequence of lengths; where the sequence ends, if that is asked for."""
    block, at = _varint(content, at)
    parts, at = _varint(content, at)
    count, at = _varint(content, at)
    _, at = _varint(content, at)  # the first length
    if block == 0 or block % BLOCK or not 0 < parts <= block // MINIBLOCK or block // parts % MINIBLOCK:
        raise Damaged(f"a page has lengths in blocks of {block}, of {parts} parts")
    if count > values:
        raise Damaged(f"a page of {values} values has {count} lengths")
    left, each = count - 1, block // parts
    while on and left > 0:
        _, at = _varint(content, at)  # the least difference
        widths, at = content[at : at + parts], at + parts
        if len(widths) < parts:
            raise IndexError
        for width in widths:
            if left <= 0:
                break
            if width > WIDEST:
                raise Damaged(f"a page has differences of {width} bits")
            at, left = at + width * each // 8, left - each
    return at


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """A whole number, seven bits a byte, and where it ends."""
    number = shift = 0
    while True:
        number |= (content[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if content[at - 1] < 128:
            return number, at
        if shift > 63:
            raise Damaged("a page has a length of more than 64 bits")
