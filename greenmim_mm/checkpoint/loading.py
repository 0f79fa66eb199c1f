"""Loading checkpoints into modules that exist, all of them or nothing."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch
from torch import Tensor, distributed, nn

from ..ops import table_window
from .layouts import TABLE
from .reading import CheckpointError, find_state_dict, read_checkpoint


def load_backbone_state_dict(module: nn.Module, path: str | Path, prefix: str | None = None) -> str:
    """Load the backbone of a checkpoint, all of it or nothing.

    Norms of single outputs (``norm0`` to ``norm3``) may be missing: pre-training has only the
    last, a detector one for each of its outputs. They keep their initial values.

    Args:
        module: The backbone. Bias tables of another window are passed to it as they are;
            :class:`~greenmim_mm.models.GreenSwin` resizes them.
        path: Checkpoint file, or its ``http(s)://`` address, see :func:`fetch`.
        prefix: Prefix of the backbone's keys; found out if None ('backbone.' or nothing).

    Returns:
        A sentence that says what was loaded, and which bias tables had another window.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be downloaded.
        CheckpointError: If the weights are not this network's; it says how many keys fit. The
            module is unchanged then.
    """
    state_dict = find_state_dict(read_checkpoint(fetch(path)), path)
    if prefix is None:
        prefix = 'backbone.' * any(key.startswith('backbone.') for key in state_dict)
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
    other_shape = [
        name for name in sorted(matched - buffers) if state_dict[name].shape != own[name].shape
    ]
    windows = {name: _windows(name, state_dict[name], own[name]) for name in other_shape}
    wrong = [name for name in other_shape if windows[name] is None]
    # A head without prefix is no harm, another network is.
    if missing or wrong or (unexpected and prefix):
        problems = _problems(own, state_dict, missing, wrong, unexpected)
        versions = [_swin_version(keys) for keys in (state_dict, own)]
        remedy = 'Check arch, or convert the file with: greenmim convert'
        if versions[0] != versions[1]:
            remedy = (
                f'These are Swin V{versions[0]} weights, whose attention is another one; they '
                f'load into GreenSwin{"V2" * (versions[0] == 2)}'
            )
        raise CheckpointError(
            f'{path} does not fit this {type(module).__name__}: {problems}. {remedy}'
        )
    module.load_state_dict({name: state_dict[name] for name in matched}, strict=False)
    report = f'loaded {len(matched)} of {len(own)} keys from {path}'
    if windows:
        counts = Counter(windows[name] for name in state_dict if name in windows)
        resized = ', '.join(f'{count} from {how}' for how, count in counts.items())
        report += f'; bias tables resized: {resized}'
    if absent := sorted(own.keys() - state_dict.keys() - buffers):
        report += f'; not in the file, left as initialised: {absent}'
    return report


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


def fetch(path: str | Path) -> Path:
    """A file that ``path`` names: itself, or for an ``http(s)://`` address what lies there.

    It is downloaded once into ``checkpoints`` of torch's hub folder (``torch.hub.get_dir()``),
    where mmengine and torch keep theirs; a hash in its name (``name-0123abcd.pth``) is checked. In
    distributed training one process downloads for all that see the folder.

    Raises:
        OSError: If it cannot be downloaded; the message names the address.
        CheckpointError: If it is not the file that its name promises.
    """
    url = str(path)
    if not url.startswith(('http://', 'https://')):
        return Path(path)
    name = Path(unquote(urlparse(url).path)).name
    if not name:
        raise FileNotFoundError(f'checkpoint {url} names no file')
    file = Path(torch.hub.get_dir(), 'checkpoints', name)
    together = distributed.is_available() and distributed.is_initialized()
    try:
        if not together or distributed.get_rank() == 0:
            _download(url, file)
    finally:
        if together:
            distributed.barrier()
    # Another machine has another folder.
    _download(url, file)
    return file


def _download(url: str, file: Path) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    promised = torch.hub.HASH_REGEX.search(file.name)
    try:
        torch.hub.download_url_to_file(url, str(file), promised and promised[1])
    except RuntimeError as error:
        raise CheckpointError(f'checkpoint {url} is not what its name promises: {error}') from error
    except (OSError, ValueError) as error:
        raise OSError(f'checkpoint {url} could not be downloaded: {error}') from error


def _windows(name: str, table: Tensor, own: Tensor) -> str | None:
    """Of which windows a bias table and one's own are, if they differ in nothing else."""
    try:
        if name.endswith(TABLE) and table.shape[1:] == own.shape[1:]:
            return f'window {table_window(table)} to {table_window(own)}'
    except ValueError:  # of no window
        pass
    return None


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
