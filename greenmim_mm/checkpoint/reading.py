"""Reading checkpoint files without running what is in them."""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

# What a folder of Hugging Face's transformers holds.
CONFIG_FILE, WEIGHTS_FILE = 'config.json', 'model.safetensors'


class CheckpointError(ValueError):
    """A file is no checkpoint, is damaged, or belongs to another architecture."""


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


# What parameters are made of. Storages are torch.load's own business.
_CALLS = {
    'collections.OrderedDict': _Call(OrderedDict),
    'torch._utils._rebuild_parameter': _Call(torch._utils._rebuild_parameter),
    'torch._utils._rebuild_tensor': _Call(torch._utils._rebuild_tensor),
    'torch._utils._rebuild_tensor_v2': _Call(torch._utils._rebuild_tensor_v2),
}
# How torch saves tensors of its newest types. Its storages without a type would have to be handed
# out as the class itself, which allocates whatever a file asks for.
_OTHER_TENSORS = {'torch._utils._rebuild_tensor_v3', 'torch.storage.UntypedStorage'}
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

    refused: list[str]

    def find_class(self, module: str, name: str) -> Any:
        # Files are written with pickle protocol 2, which calls builtins as Python 2 did.
        full_name = f'{module.replace("__builtin__", "builtins")}.{name}'
        if full_name in _CALLS:
            return _CALLS[full_name]
        if full_name not in _STAND_INS:
            # Not getattr: it would import torch's lazy submodules.
            if module == 'torch' and isinstance(vars(torch).get(name), torch.dtype):
                return vars(torch)[name]
            # The number is bounded: a crafted file may name millions.
            if full_name not in self.refused and len(self.refused) < 1000:
                self.refused.append(full_name)
        return _StandIn


def _pickle_module(refused: list[str]) -> SimpleNamespace:
    """What ``torch.load`` takes for the pickle module; refused names go into the list.

    ``weights_only=True`` will not do: before torch 2.5 it cannot be told to admit mmengine's log
    buffers, and before 2.6 it could be made to run code (CVE-2025-32434).
    """
    unpickler = type('Unpickler', (_Unpickler,), {'refused': refused})

    def load(file: BinaryIO, **kwargs: Any) -> Any:
        return unpickler(file, **kwargs).load()

    return SimpleNamespace(__name__=__name__, Unpickler=unpickler, load=load)


_ZIP_MAGIC = b'PK\x03\x04'
# torch before 1.6 began its files with this number, pickled.
_LEGACY_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
# Beside tensors a file has names, numbers and logs; a large config has some hundred kilobytes.
_MAX_HEADER = 100 << 20


def read_checkpoint(path: str | Path, trust: bool = False, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file without importing or running anything that it names.

    Args:
        path: A ``.safetensors`` file, or with any other suffix a file of ``torch.save``.
        trust: Read what would otherwise be refused as ``torch.load(weights_only=False)`` does:
            **this runs whatever code the file names**.
        mmap: Map tensors from the file instead of copying them into memory. The file must not be
            written to while they are in use.

    Returns:
        What the file holds, tensors on the CPU; for ``.safetensors`` ``dict(state_dict=...,
        meta=...)``. Unless ``trust`` is given, objects other than tensors, numbers, strings and
        plain containers, such as mmengine's log buffers, are replaced by inert stand-ins.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is truncated, is no checkpoint, claims more than it holds
            (as zip bombs do), or would run code; then it says which names it would call.
    """
    if '://' in str(path):
        raise FileNotFoundError(f'checkpoint {path} is a URL; download it and give the file')
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f'checkpoint {path} is a folder; give the file in it')
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    refused: list[str] = []
    try:
        if path.suffix == '.safetensors':
            return _read_safetensors(path)
        content = _read_torch(path, refused, trust, mmap)
    except CheckpointError:
        raise
    # A damaged or crafted file can fail in any way.
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = _first_line(error)
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f'{path} is damaged, or holds what is no part of a checkpoint and could run code; '
                f'it was not read: {reason}'
            ) from error
        if not refused:
            raise CheckpointError(
                f'{path} is truncated or is no checkpoint ({path.stat().st_size} bytes): {reason}'
            ) from error
        content = None
    if refused and all(name in _OTHER_TENSORS for name in refused):
        raise CheckpointError(
            f'{path} holds tensors that are kept in a way that is not read, as torch keeps 8-bit '
            f'floats ({_listed(refused)}); save them as float32 where the file is from'
        )
    if refused:
        raise CheckpointError(
            f'{path} holds what is no part of a checkpoint and could run code; it was not read. '
            f'Reading it plainly would import and may call {_listed(refused)}. Only if you trust '
            'whoever made it, read it with --trust'
        )
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a checkpoint dict')
    return content


def _read_torch(path: Path, refused: list[str], trust: bool, mmap: bool) -> Any:
    """Read a file of ``torch.save``; with ``refused`` filled the result is of no use."""
    with path.open('rb') as file:
        magic = file.read(len(_LEGACY_MAGIC))
        file.seek(0)
        if magic.startswith(_ZIP_MAGIC):
            _check_archive(path)
            # torch.load hands TorchScript to an interpreter of its own, past our unpickler.
            if 'constants.pkl' in torch._C.PyTorchFileReader(file).get_all_records():
                raise ValueError('this is a TorchScript program, not a checkpoint')
        elif magic != _LEGACY_MAGIC:
            raise ValueError('not a file of torch.save')
        elif not trust:
            # On a real file torch.load first tries its oldest format, a tar archive to unpack.
            source: Any = io.BytesIO(file.read())
    options: dict[str, Any] = dict(map_location='cpu', weights_only=False)
    if magic.startswith(_ZIP_MAGIC):
        options['mmap'] = mmap
        source = str(path)
    elif trust:
        source = str(path)
    if not trust:
        options['pickle_module'] = _pickle_module(refused)
    return torch.load(source, **options)


def _check_archive(path: Path) -> None:
    """Refuse an archive that claims more than the file holds: torch stores without compression."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.filename.endswith('/constants.pkl') for record in records):
        raise ValueError('this is a TorchScript program, not a checkpoint')
    declared = sum(record.file_size for record in records)
    packed = next((r.filename for r in records if r.compress_type != zipfile.ZIP_STORED), None)
    if declared > size or packed is not None:
        what = f'record {packed} is compressed' if packed else 'its records overlap'
        raise CheckpointError(
            f'{path} is no checkpoint, perhaps a zip bomb: {size} bytes would unpack to {declared}'
            f' and {what}; torch.save never compresses'
        )


def _read_safetensors(path: Path) -> dict[str, Any]:
    # The library checks that the header fits the file; it allocates no more than the file has.
    size = path.stat().st_size
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f'{path} is truncated or is no checkpoint: its safetensors header claims {length} '
            f'bytes of {size}'
        )
    try:
        with safe_open(str(path), framework='pt') as file:
            meta = dict(file.metadata() or {})
            # The file says itself which framework wrote it; Hugging Face's loaders insist on it.
            meta.pop('format', None)
            if name := meta.pop('checkpoint_format', None):
                meta['format'] = name
            return dict(state_dict={key: file.get_tensor(key) for key in file.keys()}, meta=meta)
    except SafetensorError as error:
        raise CheckpointError(
            f'{path} is truncated or is no checkpoint ({size} bytes): {_first_line(error)}'
        ) from error


def read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a folder of Hugging Face's: what the weights' file holds, and ``config.json``.

    Raises:
        FileNotFoundError: If one of the two is not there.
        CheckpointError: If one of them is damaged.
    """
    config, weights = path / CONFIG_FILE, path / WEIGHTS_FILE
    if missing := [file.name for file in (config, weights) if not file.is_file()]:
        raise FileNotFoundError(
            f'checkpoint {path} is a folder without {" and ".join(missing)}; give a file, or a '
            f'folder with {CONFIG_FILE} and {WEIGHTS_FILE}'
        )
    try:
        settings = json.loads(config.read_bytes()[:_MAX_HEADER])
    except ValueError as error:
        raise CheckpointError(f'{config} is no JSON: {_first_line(error)}') from error
    if not isinstance(settings, dict):
        raise CheckpointError(f'{config} holds a {type(settings).__name__}, not a dict')
    return read_checkpoint(weights), settings


def _listed(names: list[str]) -> str:
    return ', '.join(names[:8]) + (f' and {len(names) - 8} more' if len(names) > 8 else '')


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
