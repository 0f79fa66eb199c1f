"""Damages checkpoint files in many ways and reads them: nothing may crash, hang or pass unseen.

Each case takes a file (of ours, with a checksum of each tensor, or as others write them), damages
it by a seeded draw, and reads it in a process of its own, as converting and inspecting do. A case
fails if reading ends in anything but the weights or a `CheckpointError`, takes more than 5 seconds
of a processor or more memory than 4 times the file, or if weights are changed and the file is not
said to carry no checksum.

Example:
    python tools/analysis/fuzz_checkpoints.py --cases 2000
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: `--help` is quick without
    from torch import Tensor

ARCH = dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
MAX_SECONDS, MAX_MEMORY = 5, 4
# Sooner or later every process that is stuck without using a processor.
MAX_WAIT = 120
FORMATS = {
    # Written by us: the note has a checksum of each tensor.
    'ours.pth': 'greenmim_mm',
    'ours.safetensors': 'timm',
    'ours_bare.pth': 'torchvision',
    'ours_folder': 'huggingface',
    # As others write them.
    'archive.pth': None,
    'legacy.pth': None,
    'plain.safetensors': None,
}


@dataclass(frozen=True)
class Original:
    """A whole file: its bytes, those of another with the same names, and what it holds."""

    name: str
    data: bytes
    twin: bytes
    weights: dict[str, Tensor]
    config: str | None = None


@dataclass(frozen=True)
class Result:
    """What reading a damaged file led to.

    Attributes:
        outcome: 'refused', 'same weights', 'changed weights', 'crashed' or 'hung'.
        checked: By which checksums the file was said to be whole, if it was read.
        memory: Bytes that reading took beyond what the process had.
        seconds: Of a processor.
        message: What was raised.
    """

    outcome: str
    checked: str | None = None
    memory: int = 0
    seconds: float = 0.0
    message: str = ''


def make_originals(folder: Path, arch: dict = ARCH) -> list[Original]:
    """Write two files of each format, whose weights differ."""
    import torch
    from safetensors.torch import save_file

    from greenmim_mm.checkpoint import convert_file, load_checkpoint
    from greenmim_mm.models import GreenSwin

    for index, side in enumerate(('first', 'twin')):
        torch.manual_seed(index)
        (folder / side).mkdir(parents=True)
        weights = GreenSwin(arch=arch, window_size=2).state_dict()
        weights = {f'backbone.{k}': v + torch.rand_like(v, dtype=v.dtype) if v.is_floating_point()
                   else v for k, v in weights.items()}  # fmt: skip
        source = folder / side / 'archive.pth'
        torch.save({'state_dict': weights, 'meta': {'epoch': 3}}, source)
        torch.save(
            {'state_dict': weights, 'meta': {'epoch': 3}},
            folder / side / 'legacy.pth',
            _use_new_zipfile_serialization=False,
        )
        save_file(weights, folder / side / 'plain.safetensors')
        for name, target in FORMATS.items():
            if target:
                convert_file(source, folder / side / name, target)
    originals = []
    for name in FORMATS:
        path, twin = folder / 'first' / name, folder / 'twin' / name
        weights = load_checkpoint(path).state_dict
        config = None
        if path.is_dir():
            config = (path / 'config.json').read_text()
            path, twin = path / 'model.safetensors', twin / 'model.safetensors'
        originals.append(Original(name, path.read_bytes(), twin.read_bytes(), weights, config))
    return originals


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    """A stretch of up to a tenth, more often a short one, and often near an end."""
    length = min(len(data), 1 + int(2 ** rng.uniform(0, max(1, len(data).bit_length() - 4))))
    start = rng.choice(
        (
            rng.randrange(len(data) - length + 1),
            rng.randrange(min(4096, len(data) - length + 1)),
            len(data) - length - rng.randrange(min(4096, len(data) - length + 1)),
        )
    )
    return start, start + length


def flip_bits(original: Original, rng: random.Random) -> bytes:
    data = bytearray(original.data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        start, _ = _span(data, rng)
        data[start] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(original: Original, rng: random.Random) -> bytes:
    start, end = _span(original.data, rng)
    return original.data[:start] + rng.choice((b'', original.data[end:]))


def swap(original: Original, rng: random.Random) -> bytes:
    data = bytearray(original.data)
    first, end = _span(data, rng)
    second = rng.randrange(len(data) - (end - first) + 1)
    one, other = bytes(data[first:end]), bytes(data[second : second + end - first])
    data[first:end] = other
    data[second : second + end - first] = one
    return bytes(data)


def zero(original: Original, rng: random.Random) -> bytes:
    start, end = _span(original.data, rng)
    return original.data[:start] + bytes(end - start) + original.data[end:]


def duplicate(original: Original, rng: random.Random) -> bytes:
    start, end = _span(original.data, rng)
    place = rng.choice((start, end, len(original.data)))
    return original.data[:place] + original.data[start:end] + original.data[place:]


def splice(original: Original, rng: random.Random) -> bytes:
    """Parts of two files; of archives also whole records, each with its right checksum."""
    if original.data.startswith(b'PK') and rng.random() < 0.5:
        return _with_records(
            original.data, lambda name, data, other: rng.choice((data, other)), original.twin
        )
    start, end = _span(original.data, rng)
    other = rng.choice((start, rng.randrange(len(original.twin))))
    return original.data[:start] + original.twin[other:] + rng.choice((b'', original.data[end:]))


def change_header(original: Original, rng: random.Random) -> bytes:
    """A header of safetensors, or a pickle, that is well-formed on the outside."""
    if original.data.startswith(b'PK'):
        return _with_records(
            original.data,
            lambda name, data, _: _altered(data, rng) if name.endswith('data.pkl') else data,
            original.data,
        )
    if original.name.endswith('.pth'):
        # The pickles of a file that is no archive come first and last.
        return flip_bits(original, rng)
    length = struct.unpack('<Q', original.data[:8])[0]
    header = json.loads(original.data[8 : 8 + length])
    names = [name for name in header if name != '__metadata__']
    first, second = rng.sample(names, 2)
    meta = header.get('__metadata__', {})
    change = rng.randrange(10)
    if change == 0:
        header[first]['dtype'] = rng.choice(('I32', 'F16', 'F64', 'BF16', 'X', 'U8', 'F8_E4M3'))
    elif change == 1:
        header[first]['shape'] = header[first]['shape'][::-1]
    elif change == 2:
        header[first]['shape'] = rng.choice(([1 << 40], [-1], [0], [1.5], 'x', [1 << 64], [[1]]))
    elif change == 3:
        one, other = header[first]['data_offsets'], header[second]['data_offsets']
        header[first]['data_offsets'], header[second]['data_offsets'] = other, one
    elif change == 4:
        header[first]['data_offsets'] = [rng.randrange(-9, 1 << 40), rng.randrange(1 << 40)]
    elif change == 5:
        header[first], header[second] = header[second], header[first]
    elif change == 6:
        header[first + rng.choice(('x', '.', '\x00', '\ud800'))] = header.pop(first)
    elif change == 7:
        del header[first]
    elif change == 8:
        key = rng.choice([*meta, 'format'])
        header['__metadata__'] = {**meta, key: rng.choice(('', '{', '[]', '{"a": 1}', '[' * 5000))}
    else:
        header['__metadata__'] = rng.choice(
            (5, [], {'a': 5}, {str(i): 'x' * 99 for i in range(99)})
        )
    text = json.dumps(header)
    if rng.random() < 0.2:
        # JSON may name a key twice.
        text = text.replace(f'"{first}": ', f'"{second}": ', 1)
    return struct.pack('<Q', len(text)) + text.encode() + original.data[8 + length :]


def _altered(pickle: bytes, rng: random.Random) -> bytes:
    data = bytearray(pickle)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            # Lengths and indices as large as they get.
            data[place : place + 4] = rng.choice((b'\xff\xff\xff\x7f', b'\xff\xff\xff\xff'))
        elif kind == 2:
            data[place] = rng.choice(b'rjBXT\x8e\x8d\x96t\x85l(0120RbQ.IL')
        else:
            end = place + rng.randrange(50)
            data[place:end] = rng.choice((b'', bytes(data[place:end]) * rng.randrange(2, 9)))
    return bytes(data)


def _with_records(data: bytes, change: Callable[[str, bytes, bytes], bytes], other: bytes) -> bytes:
    """An archive with other records, and checksums that fit them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ('old', 'other', 'new')]
        paths[0].write_bytes(data)
        paths[1].write_bytes(other)
        with (
            zipfile.ZipFile(paths[0]) as old,
            zipfile.ZipFile(paths[1]) as second,
            zipfile.ZipFile(paths[2], 'w') as new,
        ):
            for name, twin in zip(old.namelist(), second.namelist(), strict=True):
                new.writestr(name, change(name, old.read(name), second.read(twin)))
        return paths[2].read_bytes()


KINDS = {
    'bit flips': flip_bits,
    'cut': cut,
    'swapped': swap,
    'zeroed': zero,
    'duplicated': duplicate,
    'spliced': splice,
    'changed header': change_header,
}


def damaged(original: Original, kind: str, rng: random.Random) -> bytes:
    """The bytes of a file after one kind of damage, which is never none."""
    while True:
        if (data := KINDS[kind](original, rng)) != original.data:
            return data


def write(original: Original, data: bytes, folder: Path) -> Path:
    """Put a file where it is read from; of a folder the weights."""
    path = folder / original.name
    if original.config is None:
        path.write_bytes(data)
    else:
        path.mkdir(exist_ok=True)
        (path / 'config.json').write_text(original.config)
        (path / 'model.safetensors').write_bytes(data)
    return path


def _status(name: str) -> int:
    """A size of this process in bytes, from /proc/self/status."""
    text = Path('/proc/self/status').read_text()
    return int(re.search(rf'^{name}:\s+(\d+) kB', text, re.MULTILINE)[1]) << 10


def _read(original: Original, path: Path) -> tuple[str, str | None, str]:
    import torch

    from greenmim_mm.checkpoint import CheckpointError, inspect_checkpoint, load_checkpoint

    try:
        checkpoint = load_checkpoint(path)
        found, checked = checkpoint.state_dict, checkpoint.checked
        same = found.keys() == original.weights.keys() and all(
            value.dtype == original.weights[key].dtype and torch.equal(value, original.weights[key])
            for key, value in found.items()
        )
        # Each way of reading by itself.
        del checkpoint, found
        inspect_checkpoint(path).summary()
    except CheckpointError as error:
        return 'refused', None, str(error)
    return ('same weights' if same else 'changed weights'), checked, ''


def read_apart(original: Original, path: Path, whole: Path, size: int) -> Result:
    """Read a file in a process of its own, with limits on time and memory.

    Args:
        original: What it was.
        path: The damaged file.
        whole: The whole file, which is read before: pages of libraries that reading needs are
            counted to a new process when it first comes to them.
        size: Bytes of the damaged file.
    """
    import torch

    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiver)
            torch.set_num_threads(1)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS + 1, MAX_SECONDS + 2))
            room = _status('VmSize') + MAX_MEMORY * size + (256 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            signal.alarm(MAX_WAIT)
            _read(original, whole)
            # Or memory that was used for the whole file would be used again unseen.
            ctypes.CDLL(None).malloc_trim(0)
            # What the process has used at most is counted from here.
            Path('/proc/self/clear_refs').write_text('5')
            before, start = _status('VmRSS'), time.process_time()
            try:
                outcome, checked, message = _read(original, path)
            except BaseException:
                outcome, checked, message = 'crashed', None, traceback.format_exc()[-1500:]
            seconds, memory = time.process_time() - start, _status('VmHWM') - before
            result = [outcome, checked, memory, seconds, message[:4000]]
            os.write(sender, json.dumps(result).encode())
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, 'rb') as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        ended = -os.waitstatus_to_exitcode(status)
        hung = ended in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)
        return Result('hung' if hung else 'crashed', message=f'ended by signal {ended}')
    return Result(*json.loads(answer))


def failure(original: Original, kind: str, result: Result, size: int) -> str | None:
    """Why a case fails; None if it does not."""
    if result.outcome in ('crashed', 'hung'):
        return f'{result.outcome}: {result.message}'
    if result.seconds > MAX_SECONDS:
        return f'took {result.seconds:.1f} s'
    if result.memory > MAX_MEMORY * size:
        return f'took {result.memory} bytes for {size}'
    if result.outcome == 'changed weights':
        # Records that were replaced and checksummed anew are as good as others.
        forged = original.name == 'archive.pth' and kind in ('changed header', 'spliced')
        if FORMATS[original.name] or (result.checked and not forged):
            return f'changed weights were said to be {result.checked}'
    return None


def run(
    cases: int, seed: int, folder: Path, arch: dict = ARCH, progress: bool = False
) -> tuple[Counter, list[str], dict[str, float]]:
    """Run the cases in turn over formats and kinds.

    Returns:
        Counts by (format, kind, outcome), the cases that failed, and the largest time in seconds
        and memory in sizes of the file.
    """
    originals = make_originals(folder / 'whole', arch)
    place = folder / 'damaged'
    place.mkdir()
    counts: Counter = Counter()
    failures = []
    largest = dict(seconds=0.0, memory=0.0)
    for original in originals:
        outcome = _read(original, folder / 'whole/first' / original.name)
        expected = 'tensors' if FORMATS[original.name] else None
        expected = 'records' if original.name == 'archive.pth' else expected
        assert outcome == ('same weights', expected, ''), (original.name, outcome)
    pairs = [(original, kind) for kind in KINDS for original in originals]
    for case in range(cases):
        original, kind = pairs[case % len(pairs)]
        data = damaged(original, kind, random.Random(f'{seed} {case}'))
        path = write(original, data, place)
        result = read_apart(original, path, folder / 'whole/first' / original.name, len(data))
        counts[original.name, kind, result.outcome] += 1
        largest['seconds'] = max(largest['seconds'], result.seconds)
        # A file that was cut to nothing is measured by what it was.
        size = max(len(data), len(original.data) // 4)
        largest['memory'] = max(largest['memory'], result.memory / size)
        if reason := failure(original, kind, result, size):
            failures.append(f'case {case} of seed {seed} ({original.name}, {kind}): {reason}')
            print(failures[-1], file=sys.stderr, flush=True)
        if progress and case % 100 == 99:
            print(f'{case + 1} of {cases} cases, {len(failures)} failed', flush=True)
    return counts, failures, largest


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--cases', type=int, default=2000, help='damaged files (default 2000)')
    parser.add_argument('--seed', type=int, default=0, help='of the damage (default 0)')
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix='fuzz_checkpoints_') as folder:
        counts, failures, largest = run(args.cases, args.seed, Path(folder), progress=True)
    outcomes = ('refused', 'same weights', 'changed weights', 'crashed', 'hung')
    for label, index in (('format', 0), ('damage', 1)):
        print(f'| {label} | {" | ".join(outcomes)} |')
        print('|---' * (len(outcomes) + 1) + '|')
        for name in dict.fromkeys(key[index] for key in counts):
            row = (sum(n for k, n in counts.items() if (k[index], k[2]) == (name, o))
                   for o in outcomes)  # fmt: skip
            print(f'| {name} | {" | ".join(map(str, row))} |')
        print()
    print(f'at most {largest["seconds"]:.2f} s and {largest["memory"]:.2f} times the file')
    print(f'{args.cases} cases, {len(failures)} failed')
    sys.exit(bool(failures))


if __name__ == '__main__':
    main()
