"""Unpickling what parameters are made of: nothing named is run, nothing claimed is allocated.

A pickle is a program. :func:`scan` reads it once without running it and refuses what would cost
more than the file is worth; :func:`unpickle` runs what is left, with a fixed list of names.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .notes import NOTE

# A Swin-L with its optimizer, schedules and logs has some 50,000 steps and 5,000 calls.
_MAX_STEPS, _MAX_CALLS = 1_000_000, 200_000
_MAX_DIMS = 64
# Steps of the binary protocols. Those left out allocate before they read (bytearrays), parse
# numbers from text, look names up in a registry, or fill sets, whose elements are hashed.
_STEPS = {
    *('PROTO', 'FRAME', 'STOP', 'MARK', 'POP', 'POP_MARK', 'MEMOIZE'),
    *('BINPUT', 'LONG_BINPUT', 'BINGET', 'LONG_BINGET', 'BINPERSID'),
    *('NONE', 'NEWTRUE', 'NEWFALSE', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT'),
    *('BINSTRING', 'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'),
    *('BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'),
    *('EMPTY_LIST', 'EMPTY_DICT', 'EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3'),
    *('APPEND', 'APPENDS', 'SETITEM', 'SETITEMS'),
    *('GLOBAL', 'STACK_GLOBAL', 'REDUCE', 'NEWOBJ', 'NEWOBJ_EX', 'BUILD'),
}
_PUTS, _GETS = {'BINPUT', 'LONG_BINPUT'}, {'BINGET', 'LONG_BINGET'}
_TUPLES = {'EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3'}
_CALL_STEPS = {'REDUCE', 'NEWOBJ', 'NEWOBJ_EX', 'BUILD', 'BINPERSID', 'GLOBAL', 'STACK_GLOBAL'}
# What lies on the stack of a pickle, as far as it matters: a tuple as a key is hashed with all
# that is in it, so that one within another costs time without bound, or the process.
_OTHER, _FLAT, _DEEP = 0, 1, 2


def scan(source: BinaryIO | mmap) -> int:
    """Check a pickle without running it.

    Bounded are its steps and calls, indices of the memo (unpicklers allocate up to the largest),
    lengths of strings and numbers (which must lie in the file), and tuples that serve as keys.

    Args:
        source: A file that stands at the beginning of the pickle.

    Returns:
        Where the pickle ends.

    Raises:
        pickle.UnpicklingError: If it has steps that no checkpoint has, or asks for too much.
        ValueError: If it is cut off.
    """
    start = source.tell()
    source.seek(0, io.SEEK_END)
    size = source.tell()
    source.seek(start)
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    steps = calls = 0
    name = None
    while name != 'STOP':
        position = source.tell()
        opcode = pickletools.code2op.get(source.read(1).decode('latin-1'))
        # Before its argument: pickletools.genops would make a number of a million digits.
        if opcode is None or opcode.name not in _STEPS:
            what = 'what stands' if opcode is None else opcode.name
            raise pickle.UnpicklingError(f'{what} at byte {position} is no step of a checkpoint')
        name = opcode.name
        argument = None if opcode.arg is None else opcode.arg.reader(source)
        steps += 1
        calls += name in _CALL_STEPS
        if steps > _MAX_STEPS or calls > _MAX_CALLS:
            raise pickle.UnpicklingError(f'its pickle has more than {steps - 1} steps')
        if name == 'FRAME' and argument > size - position:
            raise pickle.UnpicklingError(f'a frame of {argument} bytes does not fit')
        try:
            if name == 'MARK':
                marks.append(len(stack))
            elif name in _PUTS or name == 'MEMOIZE':
                index = len(memo) if argument is None else argument
                # Picklers count on from zero.
                if index > steps:
                    raise pickle.UnpicklingError(f'memo index {index} at byte {position}')
                memo[index] = stack[-1]
            elif name in _GETS:
                stack.append(memo[argument])
            elif name in _TUPLES:
                items = _pop(stack, marks, opcode)
                flat = len(items) <= _MAX_DIMS and not any(items)
                stack.append(_FLAT if flat else _DEEP)
            elif name == 'BUILD':
                stack.pop()
            elif name == 'POP' and marks and marks[-1] == len(stack):
                marks.pop()
            else:
                items = _pop(stack, marks, opcode)
                # A dict, then keys and values in turn.
                if name in ('SETITEM', 'SETITEMS') and _DEEP in items[1::2]:
                    raise pickle.UnpicklingError(f'a tuple of tuples is a key at byte {position}')
                stack.extend([_OTHER] * len(opcode.stack_after))
        except (IndexError, KeyError) as error:
            raise pickle.UnpicklingError(f'{name} at byte {position} has nothing there') from error
    return source.tell()


def _pop(stack: list[int], marks: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Take from the stack what an opcode takes."""
    count = len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        # What lies above the mark, and what comes before it.
        start = marks.pop() - opcode.stack_before.index(pickletools.markobject)
    else:
        start = len(stack) - count
    if start < 0:
        raise IndexError
    items = stack[start:]
    del stack[start:]
    return items


@dataclass(frozen=True)
class Storage:
    """The numbers of some tensors.

    Attributes:
        dtype: Their type.
        data: Their bytes.
        intact: False if their checksum differs.
    """

    dtype: torch.dtype
    data: torch.UntypedStorage
    intact: bool = True


@dataclass(frozen=True)
class Damaged:
    """Stands for a tensor whose numbers are damaged."""


class _StandIn:
    """Stands for an object of training that conversion does not need: takes anything, does nothing.

    The methods are those by which a pickle fills an object.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _Call:
    """A function that a pickle may call and cannot alter, as it could a plain function or class."""

    __slots__ = ('_function',)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('the pickle tries to alter a function')


class _Parameters(OrderedDict):
    """A dict that takes no attribute from a pickle but a note: others could replace its methods."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and NOTE in state:
            vars(self)[NOTE] = state[NOTE]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """A tensor that lies inside its storage."""
    if not isinstance(storage, Storage):
        return _StandIn()
    if not storage.intact:
        return Damaged()
    lists = [values if isinstance(values, tuple) else None for values in (size, stride)]
    if None in lists or len(size) != len(stride) or len(size) > _MAX_DIMS:
        raise pickle.UnpicklingError('a tensor has no shape')
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError('a tensor has a negative size')
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * storage.dtype.itemsize > storage.data.nbytes():
        raise pickle.UnpicklingError(
            f'a tensor claims {last + 1} values, the file has '
            f'{storage.data.nbytes() // storage.dtype.itemsize} for it'
        )
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, size, stride)


def _parameter(data: Any, *rest: Any) -> Any:
    return data if isinstance(data, (Tensor, Damaged)) else _StandIn()


# What parameters are made of.
_CALLS = {
    # No argument: copies of one long list could be made without end.
    'collections.OrderedDict': _Call(lambda: _Parameters()),
    'torch._utils._rebuild_parameter': _Call(_parameter),
    'torch._utils._rebuild_tensor': _Call(_tensor),
    'torch._utils._rebuild_tensor_v2': _Call(_tensor),
}
_DTYPES = {
    'Double': torch.float64, 'Float': torch.float32, 'Half': torch.float16,
    'BFloat16': torch.bfloat16, 'Long': torch.int64, 'Int': torch.int32, 'Short': torch.int16,
    'Char': torch.int8, 'Byte': torch.uint8, 'Bool': torch.bool,
    'ComplexFloat': torch.complex64, 'ComplexDouble': torch.complex128,
}  # fmt: skip
STORAGES = {f'torch.{name}Storage': dtype for name, dtype in _DTYPES.items()}
# How torch saves tensors of its newest types, whose storages have no type.
OTHER_TENSORS = {'torch._utils._rebuild_tensor_v3', 'torch.storage.UntypedStorage'}
# What mmengine and the authors' trainers write besides: log buffers with their statistics,
# numpy values, schedules, arguments and configs. None of them is imported or called.
_STAND_INS = {
    '_codecs.encode',
    'argparse.Namespace',
    'builtins.getattr',
    'builtins.set',
    'collections.Counter',
    'collections.defaultdict',
    'mmengine.config.config.ConfigDict',
    'mmengine.logging.history_buffer.HistoryBuffer',
    'numpy._core.multiarray._reconstruct',
    'numpy._core.multiarray.scalar',
    'numpy.core.multiarray._reconstruct',
    'numpy.core.multiarray.scalar',
    'numpy.dtype',
    'numpy.ndarray',
    'pathlib.PosixPath',
    'torch.Size',
    'torch.device',
    'yacs.config.CfgNode',
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that knows a fixed list of names and imports nothing for them.

    Other names are collected in ``refused``; stand-ins take their places to the end of the file,
    so that all of them can be told.
    """

    def __init__(
        self, data: bytes, storage: Callable[[str, torch.dtype, int], Storage], refused: list[str]
    ) -> None:
        # Files of Python 2 have strings in any encoding.
        super().__init__(io.BytesIO(data), encoding='utf-8', errors='replace')
        self._storage, self._refused = storage, refused

    def find_class(self, module: str, name: str) -> Any:
        # Files are written with pickle protocol 2, which calls builtins as Python 2 did.
        full_name = f'{module.replace("__builtin__", "builtins")}.{name}'
        if full_name in _CALLS:
            return _CALLS[full_name]
        if full_name in STORAGES:
            return STORAGES[full_name]
        if full_name not in _STAND_INS:
            # Not getattr: it would import torch's lazy submodules.
            if module == 'torch' and isinstance(vars(torch).get(name), torch.dtype):
                return vars(torch)[name]
            # The number is bounded: a crafted file may name millions.
            if len(self._refused) < 1000 and full_name not in self._refused:
                self._refused.append(full_name)
        return _StandIn

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, count = pid[:5]
        if kind != 'storage' or not isinstance(key, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError('it refers to what is no storage of numbers')
        if pid[5:] not in ((), (None,)):
            raise pickle.UnpicklingError('it has views of storages, as torch before 0.4 wrote them')
        # Of an unknown type, which has been refused.
        return self._storage(key, dtype, count) if isinstance(dtype, torch.dtype) else _StandIn()


def unpickle(
    data: bytes, storage: Callable[[str, torch.dtype, int], Storage], refused: list[str]
) -> Any:
    """What a pickle of ``torch.save`` holds; :func:`scan` comes first.

    Args:
        data: The pickle.
        storage: Gives the numbers by key, type and count.
        refused: Names that would have been imported are added to it; then the result is of no use.
    """
    return _Unpickler(data, storage, refused).load()


def damaged_key(content: Any) -> str | None:
    """Name of the first damaged tensor, with dots between the keys of dicts; None if none is."""
    # Content may hold itself.
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [('', content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Damaged):
            return name
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            inner = [(f'{name}.{key}' if name else str(key), item) for key, item in items]
            waiting += reversed(inner)
    return None
