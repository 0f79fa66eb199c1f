"""Reading and writing checkpoint files."""

import os
import pickle
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A file is no checkpoint, is damaged, or belongs to another architecture."""


class _Opaque:
    """Stands for a logging object of mmengine: takes any state, runs nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


# What mmengine writes besides tensors and plain containers: its log buffers.
_MMENGINE_CLASSES = (
    'mmengine.logging.history_buffer.HistoryBuffer',
    'numpy.core.multiarray._reconstruct',
    'numpy._core.multiarray._reconstruct',
    'numpy.core.multiarray.scalar',
    'numpy._core.multiarray.scalar',
    'numpy.ndarray',
    'numpy.dtype',
    'builtins.getattr',
)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a ``.pth`` file without running code from it.

    Args:
        path: A file of ``torch.save``. Logging objects of mmengine are read as inert stand-ins.

    Returns:
        What the file holds, tensors on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is truncated, is no checkpoint, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    allowed = [(_Opaque, name) for name in _MMENGINE_CLASSES]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{path} is not a readable checkpoint, or holds objects other than weights: '
            f'{str(error).splitlines()[0]}'
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, IndexError) as error:
        raise CheckpointError(
            f'{path} is truncated or is no checkpoint ({path.stat().st_size} bytes): '
            f'{str(error).splitlines()[0] if str(error) else type(error).__name__}'
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a checkpoint dict')
    return content


def find_state_dict(checkpoint: Mapping[str, Any], path: str | Path = 'checkpoint') -> dict:
    """The parameters inside a checkpoint: under ``state_dict``, ``model``, or the dict itself.

    A ``module.`` prefix of distributed training is removed.

    Raises:
        CheckpointError: If there are none.
    """
    inner = checkpoint.get('state_dict', checkpoint.get('model', checkpoint))
    tensors = {}
    if isinstance(inner, Mapping):
        tensors = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f'{path} holds no parameters: found the keys {list(checkpoint)[:5]}, but neither '
            "'state_dict' nor 'model' with tensors"
        )
    if all(key.startswith('module.') for key in tensors):
        tensors = {key.removeprefix('module.'): value for key, value in tensors.items()}
    return tensors


def load_backbone_state_dict(module: nn.Module, path: str | Path, prefix: str | None = None) -> str:
    """Load the backbone of a checkpoint, all of it or nothing.

    Norms of single outputs (``norm0`` to ``norm3``) may be missing: pre-training has only the
    last, a detector one for each of its outputs. They keep their initial values.

    Args:
        module: The backbone.
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
        f'{name}: {tuple(state_dict[name].shape)} in the file, {tuple(own[name].shape)} here'
        for name in sorted(matched - buffers)
        if state_dict[name].shape != own[name].shape
        and not (
            name.endswith('relative_position_bias_table')
            and state_dict[name].shape[1:] == own[name].shape[1:]
        )
    ]
    # A head without prefix is no harm, another network is.
    if missing or wrong or (unexpected and prefix):
        details = [f'{len(missing)} parameters are missing, e.g. {sorted(missing)[:2]}'] * bool(
            missing
        )
        details += [f'{len(wrong)} have another shape, e.g. {wrong[0]}'] * bool(wrong)
        details += [
            f'{len(unexpected)} are not of this network, e.g. {sorted(unexpected)[:2]}'
        ] * bool(unexpected)
        raise CheckpointError(
            f'{path} does not fit this {type(module).__name__}: {len(matched) - len(wrong)} of '
            f'{len(own)} keys match; {"; ".join(details)}. Check arch, or convert the file with '
            'tools/convert_checkpoint.py'
        )
    module.load_state_dict({name: state_dict[name] for name in matched}, strict=False)
    absent = sorted(own.keys() - state_dict.keys() - buffers)
    return f'loaded {len(matched)} of {len(own)} keys from {path}' + (
        f'; not in the file, left as initialised: {absent}' if absent else ''
    )


def write_checkpoint(content: Mapping[str, Any], path: str | Path, force: bool = False) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        content: What ``torch.save`` is to write.
        path: Destination; its folder must exist.
        force: Replace an existing file.

    Raises:
        FileExistsError: If ``path`` exists and ``force`` is not given.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f'{path} exists; choose another path or overwrite it with --force')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'folder {path.parent} does not exist; create it first')
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    try:
        torch.save(dict(content), temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
