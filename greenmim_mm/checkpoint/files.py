"""Reading and writing checkpoint files."""

import io
import os
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn


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
    """Unpickler that knows a fixed list of names and imports nothing for them."""

    def find_class(self, module: str, name: str) -> Any:
        # Files are written with pickle protocol 2, which calls builtins as Python 2 did.
        full_name = f'{module.replace("__builtin__", "builtins")}.{name}'
        if full_name in _CALLS:
            return _CALLS[full_name]
        if full_name in _STAND_INS:
            return _StandIn
        # Not getattr: it would import torch's lazy submodules.
        if module == 'torch' and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise pickle.UnpicklingError(f'it names {full_name}')


class _PickleModule:
    """What ``torch.load`` takes for the pickle module.

    ``weights_only=True`` will not do: before torch 2.5 it cannot be told to admit mmengine's log
    buffers, and before 2.6 it could be made to run code (CVE-2025-32434).
    """

    __name__ = 'greenmim_mm.checkpoint.files'
    Unpickler = _Unpickler

    @staticmethod
    def load(file: BinaryIO, **kwargs: Any) -> Any:
        return _Unpickler(file, **kwargs).load()


_ZIP_MAGIC = b'PK\x03\x04'
# torch before 1.6 began its files with this number, pickled.
_LEGACY_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a ``.pth`` file without importing or running anything that it names.

    Args:
        path: A file of ``torch.save``.

    Returns:
        What the file holds, tensors on the CPU. Objects other than tensors, numbers, strings and
        plain containers, such as mmengine's log buffers, are replaced by inert stand-ins.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is truncated, is no checkpoint, or would run code.
    """
    if '://' in str(path):
        raise FileNotFoundError(f'checkpoint {path} is a URL; download it and give the file')
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f'checkpoint {path} is a folder; give the .pth file in it')
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    with path.open('rb') as file:
        try:
            content = _load(file)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f'{path} is damaged, or holds what is no part of a checkpoint and could run code; '
                f'it was not read: {_first_line(error)}'
            ) from error
        # A damaged or crafted file can fail in any way.
        except Exception as error:
            raise CheckpointError(
                f'{path} is truncated or is no checkpoint ({path.stat().st_size} bytes): '
                f'{_first_line(error)}'
            ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a checkpoint dict')
    return content


def _load(file: BinaryIO) -> Any:
    magic = file.read(len(_LEGACY_MAGIC))
    file.seek(0)
    if magic.startswith(_ZIP_MAGIC):
        # torch.load hands TorchScript to an interpreter of its own, past our unpickler.
        if 'constants.pkl' in torch._C.PyTorchFileReader(file).get_all_records():
            raise ValueError('this is a TorchScript program, not a checkpoint')
        file.seek(0)
    elif magic == _LEGACY_MAGIC:
        # On a real file torch.load first tries its oldest format, a tar archive to unpack.
        file = io.BytesIO(file.read())
    else:
        raise ValueError('not a file of torch.save')
    return torch.load(file, map_location='cpu', pickle_module=_PickleModule, weights_only=False)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def find_state_dict(checkpoint: Mapping[str, Any], path: str | Path = 'checkpoint') -> dict:
    """The parameters inside a checkpoint: under ``state_dict``, ``model``, or the dict itself.

    A ``module.`` prefix of distributed training is removed.

    Raises:
        CheckpointError: If there are none.
    """
    key = parameters_key(checkpoint)
    inner = checkpoint if key is None else checkpoint[key]
    tensors = {}
    if isinstance(inner, Mapping):
        tensors = {
            key: value
            for key, value in inner.items()
            if isinstance(key, str) and isinstance(value, Tensor)
        }
    if not tensors:
        raise CheckpointError(
            f'{path} holds no parameters: found the keys {list(checkpoint)[:5]}, but neither '
            "'state_dict' nor 'model' with tensors"
        )
    if all(key.startswith('module.') for key in tensors):
        tensors = {key.removeprefix('module.'): value for key, value in tensors.items()}
    return tensors


def parameters_key(checkpoint: Mapping[str, Any]) -> str | None:
    """Under which key a checkpoint keeps its parameters; None if it is itself their dict."""
    return next((key for key in ('state_dict', 'model') if key in checkpoint), None)


def load_backbone_state_dict(module: nn.Module, path: str | Path, prefix: str | None = None) -> str:
    """Load the backbone of a checkpoint, all of it or nothing.

    Norms of single outputs (``norm0`` to ``norm3``) may be missing: pre-training has only the
    last, a detector one for each of its outputs. They keep their initial values.

    Args:
        module: The backbone. Bias tables of another window are passed to it as they are;
            :class:`~greenmim_mm.models.GreenSwin` resizes them.
        path: Checkpoint file.
        prefix: Prefix of the backbone's keys; found out if None ('backbone.' or nothing).

    Returns:
        A sentence that says what was loaded.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the weights are not this network's; it says how many keys fit. The
            module is unchanged then.
    """
    state_dict = find_state_dict(read_checkpoint(path), path)
    if prefix is None:
        prefix = 'backbone.' if any(key.startswith('backbone.') for key in state_dict) else ''
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    state_dict = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    own = module.state_dict()
    buffers = {name for name, _ in module.named_buffers()}
    output_norms = {
        name for name in {*own, *state_dict} if name.startswith('norm') and name[4:5].isdigit()
    }
    missing = own.keys() - state_dict.keys() - buffers - output_norms
    unexpected = state_dict.keys() - own.keys() - output_norms
    matched = own.keys() & state_dict.keys()
    wrong = [
        name
        for name in sorted(matched - buffers)
        if state_dict[name].shape != own[name].shape
        and not _resizable(name, state_dict[name], own[name])
    ]
    # A head without prefix is no harm, another network is.
    if missing or wrong or (unexpected and prefix):
        problems = _problems(own, state_dict, missing, wrong, unexpected)
        raise CheckpointError(
            f'{path} does not fit this {type(module).__name__}: {problems}. Check arch, or convert '
            'the file with tools/convert_checkpoint.py'
        )
    module.load_state_dict({name: state_dict[name] for name in matched}, strict=False)
    absent = sorted(own.keys() - state_dict.keys() - buffers)
    return f'loaded {len(matched)} of {len(own)} keys from {path}' + (
        f'; not in the file, left as initialised: {absent}' if absent else ''
    )


def load_model_state_dict(module: nn.Module, path: str | Path) -> None:
    """Load a whole model: every key must be there, none too many, each of the same shape.

    Args:
        module: The model, e.g. :class:`~greenmim_mm.models.GreenMIM`.
        path: Checkpoint file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the weights are not this model's; it says how many keys fit. The
            module is unchanged then.
    """
    state_dict = find_state_dict(read_checkpoint(path), path)
    own = module.state_dict()
    wrong = sorted(
        name for name in own.keys() & state_dict.keys() if own[name].shape != state_dict[name].shape
    )
    missing, unexpected = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    if missing or unexpected or wrong:
        problems = _problems(own, state_dict, missing, wrong, unexpected)
        raise CheckpointError(
            f'{path} is the checkpoint of another model than this {type(module).__name__}: '
            f'{problems}'
        )
    module.load_state_dict(state_dict)


def _resizable(name: str, table: Tensor, own: Tensor) -> bool:
    """Whether a bias table differs from one's own in nothing but the window size."""
    side = round(table.shape[0] ** 0.5) if table.ndim == 2 else 0
    return (
        name.endswith('relative_position_bias_table')
        and side % 2 == 1
        and side**2 == table.shape[0]
        and table.shape[1:] == own.shape[1:]
    )


def _problems(
    own: Mapping[str, Tensor],
    state_dict: Mapping[str, Tensor],
    missing: Iterable[str],
    wrong: Sequence[str],
    unexpected: Iterable[str],
) -> str:
    """How many keys fit, and what is wrong with the others."""
    num_matched = len(own.keys() & state_dict.keys()) - len(wrong)
    parts = [f'{num_matched} of {len(own)} keys match']
    if missing := sorted(missing):
        parts.append(f'{len(missing)} are missing, e.g. {missing[:2]}')
    if wrong:
        shapes = [tuple(values[wrong[0]].shape) for values in (state_dict, own)]
        parts.append(
            f'{len(wrong)} have another shape, e.g. {wrong[0]}: {shapes[0]} in the file, '
            f'{shapes[1]} here'
        )
    if unexpected := sorted(unexpected):
        parts.append(f'{len(unexpected)} are not of this network, e.g. {unexpected[:2]}')
    return '; '.join(parts)


def write_checkpoint(content: Mapping[str, Any], path: str | Path, force: bool = False) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        content: What ``torch.save`` is to write.
        path: Destination; its folder must exist.
        force: Replace an existing file.

    Raises:
        FileExistsError: If ``path`` exists and ``force`` is not given, or is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    with atomic_path(path, force) as temporary:
        torch.save(dict(content), temporary)


def check_destination(path: str | Path, force: bool = False) -> None:
    """Raise unless a file can be written to ``path``; better before long work than after it.

    Raises:
        FileExistsError: If ``path`` exists and ``force`` is not given, or is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise FileExistsError(f'{path} is a folder; give the name of a file')
    if path.exists() and not force:
        raise FileExistsError(f'{path} exists; choose another path or overwrite it with --force')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'folder {path.parent} does not exist; create it first')


@contextmanager
def atomic_path(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Path of a temporary file beside ``path`` that takes its place unless the block fails.

    Raises:
        FileExistsError: If ``path`` exists and ``force`` is not given, or is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    check_destination(path, force)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
