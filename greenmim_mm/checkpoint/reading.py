"""Reading checkpoint files without running what is in them.

From the bottom up: :func:`read_checkpoint` turns a file into what it holds (what a file may do to
its reader is decided there), :func:`load_checkpoint` finds the parameters in that.
"""

import errno
import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .containers import MAX_HEADER, DamageError, is_archive, read_torch_file
from .notes import CHECKSUMS, NOTE, find_changed
from .unpickling import OTHER_TENSORS, damaged_key

# What a folder of Hugging Face's transformers holds.
CONFIG_FILE, WEIGHTS_FILE = 'config.json', 'model.safetensors'
# Put before the names by wrappers of a model.
_WRAPPERS = ('module.', '_orig_mod.')


class CheckpointError(ValueError):
    """A file is no checkpoint, is damaged, or belongs to another architecture."""


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
            (as zip bombs do), has a checksum that differs (of a record of its archive, or of a
            tensor in its note; the message names the key), or would run code; then it says which
            names it would call.
    """
    if '://' in str(path):
        raise FileNotFoundError(f'checkpoint {path} is a URL; download it and give the file')
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f'checkpoint {path} is a folder; give the file in it')
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    safetensors = path.suffix == '.safetensors'
    content = _read_safetensors(path) if safetensors else _read_torch(path, trust, mmap)
    _, parameters = _parameters(content)
    note = next((note for note in _notes(content) if CHECKSUMS in note), {})
    if note and isinstance(parameters, Mapping):
        tensors = _named_tensors(parameters, path)
        if (key := find_changed(tensors, note[CHECKSUMS])) is not None:
            raise CheckpointError(
                f'{path} is damaged: {key} (not what was written by its checksum); get the file '
                f'again, or if it was changed on purpose, remove {CHECKSUMS} from its note'
            )
    return content


def _read_torch(path: Path, trust: bool, mmap: bool) -> dict[str, Any]:
    """What a file of ``torch.save`` holds, whole by the checksums of its archive."""
    refused: list[str] = []
    content = None
    try:
        content = read_torch_file(path, refused, trust, mmap)
    except DamageError as error:
        raise CheckpointError(f'{path} is damaged, or is no checkpoint: {error}') from error
    # A damaged or crafted file can fail in any way.
    except Exception as error:
        # A place before the beginning of a file is an invalid argument to the system.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f'{path} is damaged, or holds what is no part of a checkpoint and could run code; '
                f'it was not read: {_first_line(error)}'
            ) from error
        if not refused:
            raise _no_checkpoint(path, _first_line(error)) from error
    if refused:
        names = ', '.join(refused[:8]) + f' and {len(refused) - 8} more' * (len(refused) > 8)
        if OTHER_TENSORS.issuperset(refused):
            raise CheckpointError(
                f'{path} holds tensors that are kept in a way that is not read, as torch keeps '
                f'8-bit floats ({names}); save them as float32 where the file is from'
            )
        raise CheckpointError(
            f'{path} holds what is no part of a checkpoint and could run code; it was not read. '
            f'Reading it plainly would import and may call {names}. Only if you trust whoever '
            'made it, read it with --trust'
        )
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a checkpoint dict')
    if (key := damaged_key(content)) is not None:
        raise CheckpointError(
            f'{path} is damaged: {key} (its checksum in the archive differs); get the file again'
        )
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    # The library checks that the header fits the file; it allocates no more than the file has.
    size = path.stat().st_size
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise _no_checkpoint(path, f'its safetensors header claims {length} bytes of {size}')
    try:
        with safe_open(str(path), framework='pt') as file:
            meta = dict(file.metadata() or {})
            # The file says itself which framework wrote it; Hugging Face's loaders insist on it.
            meta.pop('format', None)
            if name := meta.pop('checkpoint_format', None):
                meta['format'] = name
            return dict(state_dict={key: file.get_tensor(key) for key in file.keys()}, meta=meta)
    except OSError:
        raise
    # As of other files, a damaged header can lead to anything.
    except Exception as error:
        raise _no_checkpoint(path, _first_line(error)) from error


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
        settings = json.loads(config.read_bytes()[:MAX_HEADER])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{config} is no JSON: {_first_line(error)}') from error
    if not isinstance(settings, dict):
        raise CheckpointError(f'{config} holds a {type(settings).__name__}, not a dict')
    return read_checkpoint(weights), settings


def _no_checkpoint(path: Path, reason: str) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(f'{path} is truncated or is no checkpoint ({size} bytes): {reason}')


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
        checked: By which checksums it was found to be whole: 'tensors' (those in a note of ours),
            'records' (CRC-32 of an archive), or None, as it has none.
    """

    path: Path
    state_dict: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    skipped: tuple[str, ...] = ()
    checked: str | None = None

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
        trust: As of :func:`read_checkpoint`, whose errors are raised.
        mmap: As of :func:`read_checkpoint`.
        key: Under which the file keeps the parameters, e.g. 'ema_state_dict'; None finds it.
    """
    path = Path(path)
    if path.is_dir():
        content, config = _read_folder(path)
    else:
        content, config = read_checkpoint(path, trust, mmap), None
    state_dict = find_state_dict(content, path, key)
    found, _ = _parameters(content)
    inner, parameters = _parameters(content, key)
    # Authors' trainers write their numbers beside the parameters, mmengine's under 'meta'.
    meta = {name: content[name] for name in ('epoch', 'iter', 'step') if name in content}
    for said in (*_notes(content), (config or {}).get(NOTE)):
        if isinstance(said, Mapping):
            meta.update((str(name), value) for name, value in said.items())
    checked = None
    if meta.pop(CHECKSUMS, None) and inner == found:
        checked = 'tensors'
    elif config is None and is_archive(path):
        checked = 'records'
    left_out = tuple(
        str(name)
        for name, value in content.items()
        if name != inner and not isinstance(value, Tensor)
    )
    plain = {k: v for k, v in meta.items() if isinstance(v, (str, int, float))}
    skipped = tuple(
        str(name)
        for name, value in parameters.items()
        if inner is not None and not (isinstance(name, str) and isinstance(value, Tensor))
    )
    return Checkpoint(path, state_dict, plain, left_out, config, skipped, checked)


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
    _, inner = _parameters(checkpoint, key)
    tensors = _named_tensors(inner, path) if isinstance(inner, Mapping) else {}
    others = [
        name
        for name, value in checkpoint.items()
        if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
    ]
    if not tensors and others:
        raise CheckpointError(
            f'{path} keeps parameters under {others[:5]}; say which ones with --key {others[0]}'
        )
    if not tensors:
        raise CheckpointError(
            f'{path} holds no parameters: found the keys {list(checkpoint)[:5]}, but neither '
            "'state_dict' nor 'model' with tensors"
        )
    # mmengine counts the steps of its averages among their parameters.
    named = {name: value for name, value in tensors.items() if name != 'steps'}
    while named and (
        prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in named)), None)
    ):
        tensors = named = {name.removeprefix(prefix): value for name, value in named.items()}
    return tensors


def _parameters(content: Mapping[str, Any], key: str | None = None) -> tuple[str | None, Any]:
    """Under which key a file keeps its parameters, and them; None if it is itself their dict."""
    key = key or next((key for key in ('state_dict', 'model') if key in content), None)
    return key, content if key is None else content[key]


def _notes(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a file says about itself: under 'meta', and beside parameters that are its dict."""
    _, parameters = _parameters(content)
    bare = vars(parameters).get(NOTE) if isinstance(parameters, OrderedDict) else None
    return [note for note in (content.get('meta'), bare) if isinstance(note, Mapping)]


def _named_tensors(parameters: Mapping[Any, Any], path: str | Path) -> dict[str, Tensor]:
    tensors = {
        name: value
        for name, value in parameters.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    for name, value in tensors.items():
        # A few bytes can pose as a tensor of any size, which the first copy would make real.
        if value.layout == torch.strided and (
            value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ):
            raise CheckpointError(
                f'{path}: {name} claims {value.numel()} values, the file has fewer for it'
            )
    return tensors
