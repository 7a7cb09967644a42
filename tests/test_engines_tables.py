"""LevelDB's tables are read as LevelDB reads them, and a part that is damaged is never taken for data."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING

import plyvel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd.engines import tables
from dbmd.engines.logs import masked_crc
from dbmd.engines.manifests import varint
from dbmd.engines.tables import BadTableError, Version
from dbmd.storage import Range

if TYPE_CHECKING:
    from pathlib import Path

ALL = Range(b"", None)


def table(folder: Path, records: list[tuple[bytes, bytes | None]], compression: str | None = None) -> Path:
    """Return the one table that LevelDB writes of these puts and deletions."""
    with closing(plyvel.DB(str(folder), create_if_missing=True)) as database:
        for key, value in records:
            if value is None:
                database.delete(key)
            else:
                database.put(key, value)
    plyvel.DB(str(folder), compression=compression).close()  # its recovery writes the log into a table
    (found,) = folder.glob("*.ldb")
    return found


@pytest.mark.parametrize("compression", [None, "snappy"])
def test_of_each_key_the_newest_version_is_read(compression: str | None, tmp_path: Path) -> None:
    """Blocks of but older versions are passed over, deletions are told, and any range of keys is found."""
    records: list[tuple[bytes, bytes | None]] = [
        (b"k%03d" % (index // 9), b"%05d" % index * 40) for index in range(900)
    ]
    records += [(b"k050", b"%05d" % index * 40) for index in range(300)] + [(b"k070", None)]
    path = table(tmp_path / "db", records, compression)
    expected = {}
    for number, (key, value) in enumerate(records, start=1):
        expected[key] = Version(key, number, value)
    for start, stop in (
        (b"", None),
        (b"k050", b"k051"),
        (b"k0", b"k02"),
        (b"k0505", b"k07"),
        (b"k099", None),
        (b"z", None),
    ):
        span = Range(start, stop)
        assert list(tables.newest(str(path), span)) == [
            each for key, each in sorted(expected.items()) if span.holds(key)
        ]


@pytest.mark.parametrize("compression", [None, "snappy"])
def test_a_flipped_byte_is_found_or_does_not_matter(compression: str | None, tmp_path: Path) -> None:
    """Whatever byte of a table is hurt, what is read is right, or nothing is."""
    path = table(tmp_path / "db", [(b"k%02d" % index, b"v" * 50) for index in range(20)], compression)
    whole, content = list(tables.newest(str(path), ALL)), path.read_bytes()
    errors = 0
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes((content[at] ^ 255,)) + content[at + 1 :])
        try:
            assert list(tables.newest(str(path), ALL)) == whole
        except BadTableError:
            errors += 1
    assert errors > len(content) / 6
    for size in (0, 20, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(BadTableError, match="does not end as a table does"):
            list(tables.newest(str(path), ALL))


@pytest.mark.parametrize(
    "data, plain",
    [
        (b"\x00", b""),
        (b"\x03\x08abc", b"abc"),
        (b"\x3d\xf0\x3c" + b"x" * 61, b"x" * 61),  # a literal whose length stands in one byte
        (b"\xac\x02\xf4\x2b\x01" + b"y" * 300, b"y" * 300),  # in two
        (b"\x0c\x08abc\x15\x03", b"abcabcabcabc"),  # a copy that runs into itself: 9 bytes from 3 behind
        (b"\x06\x08abc\x0a\x03\x00", b"abcabc"),  # an offset of two bytes
        (b"\x06\x08abc\x0b\x03\x00\x00\x00", b"abcabc"),  # of four
    ],
)
def test_snappy_is_read(data: bytes, plain: bytes) -> None:
    """Literals and copies of every kind are read as Snappy's description says."""
    assert tables.unsnapped(data) == plain


@pytest.mark.parametrize(
    "data",
    [
        b"\x03\x08ab",  # a literal that is cut short
        b"\x04\x08abc",  # less than was promised
        b"\x02\x08abc",  # more
        b"\x06\x08abc\x09\x00",  # a copy from nowhere
        b"\x06\x08abc\x09\x04",  # from before the beginning
        b"\x06\x08abc\x0a\x03",  # whose offset is cut short
        b"\x02\x08abc" + b"\xfe\xff\x00" * 9,  # which would grow for ever
    ],
)
def test_what_is_no_snappy_is_refused(data: bytes) -> None:
    """Bytes that mean nothing are an error."""
    with pytest.raises(BadTableError):
        tables.unsnapped(data)


@given(data=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Nothing else comes out of hostile bytes."""
    try:
        plain = tables.unsnapped(data)
    except (BadTableError, IndexError):
        return
    assert len(plain) == varint(data, 0)[0]


def test_a_block_of_another_kind_is_named(tmp_path: Path) -> None:
    """A later LevelDB may know more ways to compress."""
    path = table(tmp_path / "db", [(b"k", os.urandom(50))])
    content = bytearray(path.read_bytes())
    footer = bytes(content[-tables.FOOTER_BYTES :])
    (_, at) = tables._handle(footer, 0)
    (offset, size), _ = tables._handle(footer, at)
    content[offset + size] = 4
    content[offset + size + 1 : offset + size + 5] = tables._WORD.pack(
        masked_crc(bytes(content[offset : offset + size + 1]))
    )
    path.write_bytes(content)
    with pytest.raises(BadTableError, match="kind 4, which is not known"):
        list(tables.newest(str(path), ALL))
