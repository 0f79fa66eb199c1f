"""Files of ``torch.save``: archives, and the pickles that torch wrote before version 1.6.

They are taken apart here and not by ``torch.load``. It looks at no checksum, takes the lengths of
storages from the pickle and not from the file, and its ``weights_only=True`` allocates what a
pickle asks for, cannot be told before torch 2.5 to admit mmengine's log buffers, and could be made
to run code before 2.6 (CVE-2025-32434).
"""

import io
import mmap
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..compat import load_mapped
from .unpickling import Storage, scan, unpickle

_ZIP_MAGIC = b'PK\x03\x04'
# torch before 1.6 began its files with this number, pickled.
_LEGACY_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
# Beside tensors a file has names, numbers and logs; a large config has some hundred kilobytes.
MAX_HEADER = 100 << 20
_CHUNK = 1 << 20


class DamageError(ValueError):
    """A file is not what its writer wrote, or claims what it does not hold."""


@dataclass(frozen=True)
class _Place:
    """Where in a file the bytes of a storage lie, and whether their checksum is right."""

    start: int
    size: int
    intact: bool = True


def read_torch_file(path: Path, refused: list[str], trust: bool, mapped: bool) -> Any:
    """Read a file of ``torch.save``.

    Args:
        path: The file.
        refused: Names that the file would import are added to it; then the result is of no use.
        trust: Leave reading to ``torch.load(weights_only=False)``, which runs what is named.
        mapped: Map tensors from an archive instead of copying them.

    Raises:
        DamageError: If it is an archive and its entries do not add up, or the checksum of one that
            holds no numbers differs. Tensors with such numbers become ``Damaged``.
        Exception: Whatever a damaged or crafted file leads to.
    """
    with path.open('rb') as file:
        magic = file.read(len(_LEGACY_MAGIC))
        file.seek(0)
        if magic.startswith(_ZIP_MAGIC):
            return _read_archive(path, file, refused, trust, mapped)
        if magic != _LEGACY_MAGIC:
            raise ValueError('not a file of torch.save')
        if not trust:
            return _read_pickles(path, file, refused)
    return torch.load(path, 'cpu', weights_only=False)


def is_archive(path: Path) -> bool:
    """Whether a file is an archive, as ``torch.save`` makes them since 1.6."""
    with path.open('rb') as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _read_archive(path: Path, file: BinaryIO, refused: list[str], trust: bool, mapped: bool) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = _check_records(archive, path.stat().st_size)
        roots = [name.removesuffix('data.pkl') for name in records if _is_pickle(name)]
        if len(roots) != 1:
            raise ValueError(f'an archive with {len(roots)} files data.pkl')
        root = roots[0]
        places, others = {}, {}
        for name, record in records.items():
            key = name.removeprefix(root)
            if key.startswith('data/'):
                start = _data_start(file, record)
                places[key[5:]] = _Place(start, record.file_size, _is_intact(archive, record))
            elif record.file_size > MAX_HEADER:
                raise DamageError(f'record {name} has {record.file_size} bytes')
            else:
                others[key] = archive.read(record)
    if trust:
        if bad := next((key for key, place in places.items() if not place.intact), None):
            raise DamageError(f'the checksum of data/{bad} differs')
        return load_mapped(path) if mapped else torch.load(path, 'cpu', weights_only=False)
    data = others['data.pkl']
    scan(io.BytesIO(data))
    swapped = others.get('byteorder', b'little').decode() != sys.byteorder
    return unpickle(data, _storages(path, places, mapped and not swapped, swapped), refused)


def _is_pickle(name: str) -> bool:
    return name.endswith('/data.pkl') and name.count('/') == 1


def _check_records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries of an archive by name, none of which claims more than the file holds."""
    records = {record.filename: record for record in archive.infolist()}
    if any(name.endswith('/constants.pkl') for name in records):
        # torch.load would hand TorchScript to an interpreter of its own.
        raise ValueError('this is a TorchScript program, not a checkpoint')
    declared = sum(record.file_size for record in archive.infolist())
    packed = next((n for n, r in records.items() if r.compress_type != zipfile.ZIP_STORED), None)
    if declared > size or packed is not None:
        what = f'record {packed} is compressed' if packed else 'its records overlap'
        raise DamageError(
            f'perhaps a zip bomb: {size} bytes would unpack to {declared} and {what}; torch.save '
            'never compresses'
        )
    if len(records) != len(archive.infolist()):
        raise DamageError('its archive has two records of one name')
    return records


def _is_intact(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    """Whether the bytes of an entry have the checksum that the archive tells; none is kept."""
    try:
        with archive.open(record) as entry:
            while entry.read(_CHUNK):
                pass
    except zipfile.BadZipFile as error:
        if 'CRC-32' not in str(error):
            raise
        return False
    return True


def _data_start(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: after its own header, whose names differ in length."""
    file.seek(record.header_offset + 26)
    lengths = file.read(4)
    return (
        record.header_offset
        + 30
        + int.from_bytes(lengths[:2], 'little')
        + int.from_bytes(lengths[2:], 'little')
    )


def _read_pickles(path: Path, file: BinaryIO, refused: list[str]) -> Any:
    """Read a number, a version, facts about the writer, the content, keys, and their storages."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        ends = [0, *(scan(data) for _ in range(5))]
        parts = [data[start:end] for start, end in zip(ends, ends[1:], strict=False)]
        facts, keys = (unpickle(parts[i], _no_storage, refused) for i in (2, 4))
        swapped = facts.get('little_endian', True) != (sys.byteorder == 'little')
        sizes: dict[str, int] = {}

        def width(key: str, dtype: torch.dtype, count: int) -> Storage:
            sizes[key] = dtype.itemsize
            return Storage(dtype, torch.UntypedStorage(0), intact=False)

        # Storages tell their lengths in numbers, of which the content alone knows the type.
        unpickle(parts[3], width, [])
        places, start = {}, ends[-1]
        for key in keys:
            size = int.from_bytes(data[start : start + 8], sys.byteorder) * sizes[key]
            start += 8
            if start + size > len(data):
                raise DamageError(
                    f'storage {key} claims {size} bytes, {len(data) - start} are left'
                )
            places[key] = _Place(start, size)
            start += size
    return unpickle(parts[3], _storages(path, places, mapped=False, swapped=swapped), refused)


def _no_storage(key: str, dtype: torch.dtype, count: int) -> Storage:
    raise pickle.UnpicklingError('numbers where none belong')


def _storages(
    path: Path, places: Mapping[str, _Place], mapped: bool, swapped: bool
) -> Callable[[str, torch.dtype, int], Storage]:
    """Gives the storages of a file; one for each key, so that tensors share what they shared."""
    # Private: what is written to it does not reach the file.
    whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    cache: dict[str, torch.UntypedStorage] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        place = places[key]
        if count * dtype.itemsize > place.size:
            raise DamageError(
                f'storage {key} claims {count} values of {dtype}, the file has {place.size} bytes'
            )
        if key not in cache:
            data = whole[place.start : place.start + place.size]
            # Processors may want numbers at multiples of their size.
            if not mapped or place.start % dtype.itemsize:
                data = data.clone()
            if swapped:
                data.byteswap(dtype)
            cache[key] = data
        return Storage(dtype, cache[key], place.intact)

    return storage
