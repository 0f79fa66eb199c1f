"""Reading checkpoint files without running what is in them.

From the bottom up: :func:`read_checkpoint` turns a file into what it holds (what a file may do to
its reader is decided there), :func:`load_checkpoint` finds the parameters in that.
"""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# What a folder of Hugging Face's transformers holds.
CONFIG_FILE, WEIGHTS_FILE = 'config.json', 'model.safetensors'
# Where a file that is a bare dict of parameters, and config.json, keep a note of where it is from.
NOTE = 'greenmim_mm'
# Put before the names by wrappers of a model.
_WRAPPERS = ('module.', '_orig_mod.')


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


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
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


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file or folder holds.

    Attributes:
        path: The file or folder.
        state_dict: The parameters, under the names that the file gives them.
        meta: What the file says about itself: numbers and strings.
        left_out: What it holds besides, e.g. 'optimizer'.
        config: ``config.json`` of a folder of Hugging Face's, or None.
        skipped: Entries among the parameters that are no tensors, or have no name.
    """

    path: Path
    state_dict: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    skipped: tuple[str, ...] = ()

    @property
    def weights_file(self) -> Path:
        """The file with the parameters."""
        return self.path / WEIGHTS_FILE if self.config is not None else self.path


def load_checkpoint(
    path: str | Path, trust: bool = False, mmap: bool = False, key: str | None = None
) -> Checkpoint:
    """Read a checkpoint: ``.safetensors``, a file of ``torch.save``, or a folder.

    Args:
        path: The file, or a folder of Hugging Face's with ``config.json`` and
            ``model.safetensors``.
        trust: See :func:`~greenmim_mm.checkpoint.read_checkpoint`: runs what the file names.
        mmap: Map tensors from the file instead of copying them into memory.
        key: Under which the file keeps the parameters, e.g. 'ema_state_dict'; None finds it.

    Returns:
        Parameters and what the file says about itself.

    Raises:
        FileNotFoundError: If there is no such file, or a folder lacks one of the two.
        CheckpointError: If the file is damaged, is no checkpoint, or would run code.
    """
    path = Path(path)
    if path.is_dir():
        content, config = _read_folder(path)
    else:
        content, config = read_checkpoint(path, trust, mmap), None
    state_dict = find_state_dict(content, path, key)
    inner = key or _parameters_key(content)
    parameters = content if inner is None else content[inner]
    # Authors' trainers write their numbers beside the parameters, mmengine's under 'meta'.
    meta = {key: content[key] for key in ('epoch', 'iter', 'step') if key in content}
    for said in (
        content.get('meta'),
        (config or {}).get(NOTE),
        vars(parameters).get(NOTE) if isinstance(parameters, OrderedDict) else None,
    ):
        if isinstance(said, Mapping):
            meta.update((str(key), value) for key, value in said.items())
    left_out = tuple(
        str(key) for key, value in content.items() if key != inner and not isinstance(value, Tensor)
    )
    plain = {k: v for k, v in meta.items() if isinstance(v, (str, int, float))}
    skipped = tuple(
        str(name)
        for name, value in parameters.items()
        if inner is not None and not (isinstance(name, str) and isinstance(value, Tensor))
    )
    return Checkpoint(path, state_dict, plain, left_out, config, skipped)


def find_state_dict(
    checkpoint: Mapping[str, Any], path: str | Path = 'checkpoint', key: str | None = None
) -> dict:
    """The parameters inside a checkpoint: under ``state_dict``, ``model``, or the dict itself.

    Prefixes ``module.`` of distributed training and averaging and ``_orig_mod.`` of
    ``torch.compile`` are removed.

    Args:
        checkpoint: What a file holds.
        path: For messages.
        key: Where they are; None looks in these places.

    Raises:
        CheckpointError: If there are none.
    """
    if key is not None and key not in checkpoint:
        raise CheckpointError(
            f'{path} has no {key!r}; it has the keys {list(map(str, checkpoint))[:8]}'
        )
    key = key or _parameters_key(checkpoint)
    inner = checkpoint if key is None else checkpoint[key]
    tensors = {}
    if isinstance(inner, Mapping):
        tensors = {
            key: value
            for key, value in inner.items()
            if isinstance(key, str) and isinstance(value, Tensor)
        }
    others = [name for name, value in checkpoint.items() if _holds_tensors(value)]
    if not tensors and others:
        raise CheckpointError(
            f'{path} keeps parameters under {others[:5]}; say which ones with --key {others[0]}'
        )
    if not tensors:
        raise CheckpointError(
            f'{path} holds no parameters: found the keys {list(checkpoint)[:5]}, but neither '
            "'state_dict' nor 'model' with tensors"
        )
    for name, value in tensors.items():
        # A few bytes can pose as a tensor of any size, which the first copy would make real.
        if value.layout == torch.strided and (
            value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ):
            raise CheckpointError(
                f'{path}: {name} claims {value.numel()} values, the file has fewer for it'
            )
    # mmengine counts the steps of its averages among their parameters.
    named = {name: value for name, value in tensors.items() if name != 'steps'}
    while named and (
        prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in named)), None)
    ):
        tensors = named = {name.removeprefix(prefix): value for name, value in named.items()}
    return tensors


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _parameters_key(checkpoint: Mapping[str, Any]) -> str | None:
    """Under which key a checkpoint keeps its parameters; None if it is itself their dict."""
    return next((key for key in ('state_dict', 'model') if key in checkpoint), None)
