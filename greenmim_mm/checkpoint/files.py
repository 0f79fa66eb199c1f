"""Reading and writing checkpoint files."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import infer_architecture
from .convert import canonical_state_dict
from .formats import FORMATS, find_format
from .huggingface import make_config
from .reading import CheckpointError, read_checkpoint, read_folder
from .writing import (
    SAFETENSORS_SUFFIX,
    TORCH_SUFFIXES,
    WEIGHTS_FILE,
    atomic_folder,
    atomic_path,
    check_destination,
    check_folder_destination,
    write_folder,
    write_safetensors,
    write_torch,
)

# Where a file that is a bare dict of parameters keeps a note of where it is from.
_NOTE = 'greenmim_mm'
# Put before the names by wrappers of a model.
_WRAPPERS = ('module.', '_orig_mod.')


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
        content, config = read_folder(path)
    else:
        content, config = read_checkpoint(path, trust, mmap), None
    state_dict = find_state_dict(content, path, key)
    inner = key or parameters_key(content)
    parameters = content if inner is None else content[inner]
    # Authors' trainers write their numbers beside the parameters, mmengine's under 'meta'.
    meta = {key: content[key] for key in ('epoch', 'iter', 'step') if key in content}
    for said in (
        content.get('meta'),
        (config or {}).get(_NOTE),
        vars(parameters).get(_NOTE) if isinstance(parameters, OrderedDict) else None,
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


def check_target(path: str | Path, target: str, force: bool = False) -> None:
    """Raise unless a checkpoint of a format can be written to ``path``.

    Raises:
        ValueError: If the format is unknown or cannot be written under the path's suffix.
        FileExistsError: If the path is taken and ``force`` is not given.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    find_format(target)
    suffixes = (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
    if target == 'huggingface':
        if path.suffix in suffixes:
            raise ValueError(
                f'{path}: huggingface takes a folder, which gets config.json and {WEIGHTS_FILE}; '
                'give a name without suffix'
            )
        check_folder_destination(path, force)
        return
    # A folder is reported as such, whatever its name.
    check_destination(path, force)
    if path.suffix not in suffixes:
        raise ValueError(
            f'{path}: the suffix decides what is written; use one of {", ".join(suffixes)}'
        )


def write_format(
    state_dict: Mapping[str, Tensor],
    path: Path,
    target: str,
    meta: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters in the form of a format to a file, or into a folder that exists."""
    meta = dict(meta)
    if target == 'huggingface':
        config = {**(config or {}), _NOTE: meta}
        write_folder(state_dict, config, meta, path)
    elif path.suffix == SAFETENSORS_SUFFIX:
        write_safetensors(state_dict, path, meta)
    elif wrapper := FORMATS[target].wrapper:
        write_torch({'meta': meta, wrapper: dict(state_dict)}, path)
    else:
        # Such files are the dict itself; an attribute is all that can be added to it.
        bare = OrderedDict(state_dict)
        setattr(bare, _NOTE, meta)
        write_torch(bare, path)


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
    check_target(path, target, force)
    if target == 'huggingface' and config is None:
        canonical = canonical_state_dict(state_dict, target)
        config = make_config(infer_architecture(canonical), state_dict)
    place = atomic_folder if target == 'huggingface' else atomic_path
    with place(path, force) as temporary:
        write_format(state_dict, temporary, target, {**(meta or {}), 'format': target}, config)


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
    key = key or parameters_key(checkpoint)
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
    # SimMIM's token for hidden patches goes with its pre-training.
    unexpected = state_dict.keys() - own.keys() - output_norms - {'mask_token'}
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
        versions = [_swin_version(keys) for keys in (state_dict, own)]
        remedy = 'Check arch, or convert the file with tools/convert_checkpoint.py'
        if versions[0] != versions[1]:
            remedy = (
                f'These are Swin V{versions[0]} weights, whose attention is another one; they '
                f'load into GreenSwin{"V2" * (versions[0] == 2)}'
            )
        raise CheckpointError(
            f'{path} does not fit this {type(module).__name__}: {problems}. {remedy}'
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


def _swin_version(keys: Iterable[str]) -> int:
    """1 or 2: V2 alone has a scale of its cosine attention."""
    return 2 if any(key.endswith('attn.w_msa.logit_scale') for key in keys) else 1


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
