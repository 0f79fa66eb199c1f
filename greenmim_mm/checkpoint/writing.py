"""Write: parameters become a file of their format, or a folder, whole or not at all."""

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..fileio import (
    atomic_folder,
    atomic_path,
    check_destination,
    check_folder_destination,
    check_space,
    plain_rights,
)
from .formats import FORMATS, find_format
from .huggingface import make_config
from .network import network_of
from .notes import CHECKSUMS, NOTE, make_checksums
from .reading import CONFIG_FILE, WEIGHTS_FILE

TORCH_SUFFIXES = ('.pth', '.pt', '.bin')
SAFETENSORS_SUFFIX = '.safetensors'
# In the messages of torch's and safetensors' writers.
_WRITE_ERRORS = ('write', 'os error', 'iostream', 'inline_container')


def check_target(path: str | Path, target: str, force: bool = False) -> None:
    """Raise unless a checkpoint of a format can be written to ``path``; see save_checkpoint."""
    path = Path(path)
    find_format(target)
    suffixes = (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
    if target == 'huggingface':
        if path.suffix in suffixes:
            raise ValueError(
                f'{path}: huggingface takes a folder, which gets {CONFIG_FILE} and {WEIGHTS_FILE}; '
                'give a name without suffix'
            )
        if os.path.lexists(path) and not path.is_dir():
            raise FileExistsError(f'{path} is a file; this format takes the name of a folder')
        check_folder_destination(path, force, _check_replaced)
        return
    # A folder is reported as such, whatever its name.
    check_destination(path, force)
    if path.suffix not in suffixes:
        raise ValueError(
            f'{path}: the suffix decides what is written; use one of {", ".join(suffixes)}'
        )


@contextmanager
def writing(
    state_dict: Mapping[str, Tensor],
    path: str | Path,
    target: str,
    note: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Iterator[Path]:
    """Where the written file or folder lies until the block has ended and it takes its place.

    Arguments and errors are those of :func:`save_checkpoint`. To the note come checksums of the
    parameters.
    """
    path = Path(path)
    check_target(path, target, force)
    check_space(path, sum(value.numel() * value.element_size() for value in state_dict.values()))
    if target == 'huggingface':
        place = atomic_folder(path, force, _check_replaced)
    else:
        place = atomic_path(path, force)
    with place as temporary:
        with _os_errors(path):
            _write(state_dict, temporary, target, note, config)
        yield temporary


def save_checkpoint(
    state_dict: Mapping[str, Tensor],
    path: str | Path,
    target: str,
    meta: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write parameters as files of their format are, whole or not at all.

    Args:
        state_dict: Parameters under the names of ``target``; nothing is converted.
        path: ``.pth``, ``.pt`` or ``.bin`` for a file of ``torch.save``, or ``.safetensors``;
            for 'huggingface' a folder.
        target: Format, a key of :data:`~greenmim_mm.checkpoint.FORMATS`.
        meta: What the file is to say about itself: numbers and strings.
        config: For 'huggingface' what ``config.json`` is to hold; made from the parameters if
            None.
        force: Replace what is there.

    Raises:
        ValueError: If the format is unknown or does not go with the path's suffix.
        FileExistsError: If the path is taken and ``force`` is not given.
        FileNotFoundError: If its folder does not exist.
        OSError: If it cannot be written, e.g. because the disk is full.
    """
    if target == 'huggingface' and config is None:
        config = make_config(network_of(state_dict, target).architecture, state_dict)
    with writing(state_dict, path, target, {**(meta or {}), 'format': target}, config, force):
        pass


def _check_replaced(path: Path) -> None:
    """Raise ``FileExistsError`` if a folder holds anything but an earlier result."""
    inside = {entry.name for entry in path.iterdir()}
    if foreign := sorted(inside - {CONFIG_FILE, WEIGHTS_FILE}):
        raise FileExistsError(f'{path} holds other things, e.g. {foreign[0]}; name a new folder')


def _write(
    state_dict: Mapping[str, Tensor],
    path: Path,
    target: str,
    note: Mapping[str, Any],
    config: Mapping[str, Any] | None,
) -> None:
    checked = {**note, CHECKSUMS: make_checksums(state_dict)}
    if target == 'huggingface':
        weights, settings = path / WEIGHTS_FILE, {**(config or {}), NOTE: dict(note)}
        _write_safetensors(state_dict, weights, checked)
        # safetensors makes files that their owner alone may read.
        os.chmod(weights, plain_rights())
        (path / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + '\n', 'utf-8')
    elif path.suffix == SAFETENSORS_SUFFIX:
        _write_safetensors(state_dict, path, checked)
    elif wrapper := FORMATS[target].wrapper:
        torch.save({'meta': checked, wrapper: dict(state_dict)}, path)
    else:
        # Such files are the dict itself; an attribute is all that can be added to it.
        bare = OrderedDict(state_dict)
        setattr(bare, NOTE, checked)
        torch.save(bare, path)


def _write_safetensors(
    state_dict: Mapping[str, Tensor], path: Path, note: Mapping[str, Any]
) -> None:
    """Write ``.safetensors``; its metadata are strings.

    The key ``format`` is taken: it names the framework, and Hugging Face's loaders insist on it.
    A format of ours stands under ``checkpoint_format``.
    """
    strings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in note.items()}
    if 'format' in strings:
        strings['checkpoint_format'] = strings['format']
    save_file(_separate(state_dict), path, {**strings, 'format': 'pt'})


def _separate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, and no two that share memory."""
    seen: set[tuple[int, int]] = set()
    result = {}
    for key, value in state_dict.items():
        value = value.detach().contiguous()
        place = (value.untyped_storage().data_ptr(), value.storage_offset())
        if value.numel() and place in seen:
            value = value.clone()
        seen.add(place)
        result[key] = value
    return result


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn what libraries raise when the system refuses to write into ``OSError``."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        # The C++ and Rust code below torch and safetensors hides the system's error in a text.
        text = str(error)
        if not any(word in text.lower() for word in _WRITE_ERRORS):
            raise
        line = next(iter(text.splitlines()), '')
        raise OSError(
            f'{path.parent} could not be written to ({line}); is the disk full?'
        ) from error
