"""What a file says about itself: a hash, and a checksum for each tensor in the note beside them.

Archives of ``torch.save`` have a CRC-32 for each of their records, safetensors has none; neither
notices that records of two files were put together, or that a type or a shape was changed.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# Where a file that is a bare dict of parameters, and config.json, keep the note.
NOTE = 'greenmim_mm'
# Its entry with the checksums.
CHECKSUMS = 'tensor_crc32'


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open('rb') as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def make_checksums(state_dict: Mapping[str, Tensor]) -> str:
    """Checksums of parameters by name, as JSON: a note may be of strings alone."""
    return json.dumps({key: _checksum(value) for key, value in _dense(state_dict).items()})


def find_changed(state_dict: Mapping[str, Tensor], checksums: str) -> str | None:
    """The first parameter that is not as its checksum tells; None if all are.

    Args:
        state_dict: Parameters by name.
        checksums: What :func:`make_checksums` gave for them.

    Returns:
        The name of one that differs, is lacking or has none, or that of the checksums themselves
        if they cannot be read.
    """
    try:
        told = json.loads(checksums)
    except (ValueError, TypeError, RecursionError):
        told = None
    if not isinstance(told, dict):
        return CHECKSUMS
    found = _dense(state_dict)
    if strangers := [key for key in (*told, *found) if key not in found or key not in told]:
        return strangers[0]
    return next((key for key, value in found.items() if told[key] != _checksum(value)), None)


def _checksum(tensor: Tensor) -> str:
    """CRC-32 of type, shape and bytes (row by row, the lowest first), in 8 hexadecimal digits."""
    shape = 'x'.join(map(str, tensor.shape))
    crc = zlib.crc32(f'{str(tensor.dtype).removeprefix("torch.")} {shape}:'.encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        numbers = flat.view(torch.uint8).numpy()
        if sys.byteorder == 'big':
            numbers = numbers.reshape(-1, tensor.element_size())[:, ::-1].copy().reshape(-1)
        crc = zlib.crc32(numbers, crc)
    return f'{crc:08x}'


def _dense(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sparse tensors have no bytes of their own."""
    return {k: v for k, v in state_dict.items() if v.layout == torch.strided}
