"""Resize: the same network with windows of another size, and the buffers that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..ops import (
    coords_windows,
    log_spaced_offsets,
    relative_position_index,
    resize_bias_table,
    table_window,
)
from .architecture import Architecture, check_window_size
from .network import Network
from .reading import CheckpointError
from .transforms import INDEX, TABLE, Entry


def resize(
    network: Network,
    window_size: int | Sequence[int] | None = None,
    pretrained_window_size: int | Sequence[int] | None = None,
) -> Network:
    """Give a network other windows, and tell what its file does not.

    In Swin V1 bias tables are resized. The learned parameters of Swin V2 are the same for every
    window; it remembers those of its pre-training.

    Args:
        network: The network.
        window_size: Its windows then, one for all stages or one for each; None keeps them.
        pretrained_window_size: Swin V2: windows of the pre-training, if nothing tells them.

    Raises:
        ValueError: If a size makes no sense, or windows of pre-training are given for a Swin V1
            or others than those that are told.
    """
    architecture = network.architecture
    if pretrained_window_size is not None:
        architecture = _with_pretraining(architecture, pretrained_window_size)
    if window_size is not None:
        architecture = architecture.with_window(window_size)
    entries = dict(network.entries)
    for name, entry in entries.items():
        if not name.endswith(TABLE):
            continue
        old, new = table_window(entry.value), architecture.window_sizes[_stage(name)]
        if new != old:
            table = resize_bias_table(entry.value, (2 * new - 1) ** 2)
            entries[name] = entry.changed(table, f'window {old} to {new} resized')
    return replace(network, entries=entries, architecture=architecture)


def with_buffers(
    entries: Mapping[str, Entry], architecture: Architecture, leaves: Sequence[str]
) -> dict[str, Entry]:
    """The entries with the buffers ``leaves`` of every block, as far as windows are known.

    Those of the file are kept where they are right, to the last bit. New ones have no source.
    """
    result = dict(entries)
    if architecture.window_sizes is None:
        return result
    for name in entries:
        if not name.endswith('.attn.w_msa.proj.weight'):
            continue
        stage = _stage(name)
        window = architecture.window_sizes[stage]
        pretrained = architecture.pretrained_window_sizes
        scale = None if pretrained is None else pretrained[stage]
        for leaf in leaves:
            key = name.removesuffix('proj.weight') + leaf
            known = entries.get(key)
            if known is not None and _is_right(known.value, leaf, window, scale):
                continue
            value, why = _buffer(leaf, window, scale)
            result[key] = Entry(value, {}, (why,)) if known is None else known.changed(value, why)
    return result


def _with_pretraining(architecture: Architecture, sizes: int | Sequence[int]) -> Architecture:
    sizes = check_window_size(sizes, len(architecture.depths), 'pretrained_window_size')
    if architecture.version == 1:
        raise CheckpointError(
            '--pretrained-window-size is for Swin V2; this is a Swin V1, whose bias tables tell '
            'their windows'
        )
    if architecture.pretrained_window_sizes not in (None, sizes):
        raise CheckpointError(
            f'it tells that it was pre-trained with windows {architecture.pretrained_window_sizes}'
            f'; --pretrained-window-size says {sizes}'
        )
    return replace(architecture, pretrained_window_sizes=sizes)


def _stage(name: str) -> int:
    return int(name.split('.')[1])


def _is_right(value: Tensor, leaf: str, window: int, scale: int | None) -> bool:
    """Whether a buffer of a file is that of the windows."""
    if leaf == INDEX:
        right = relative_position_index(window)
        return value.shape == right.shape and bool((value == right).all())
    # In files of half precision offsets have been rounded.
    return value.dtype == torch.float32 and coords_windows(value) == (window, scale)


def _buffer(leaf: str, window: int, scale: int | None) -> tuple[Tensor, str]:
    why = f'buffer of window {window}'
    if leaf == INDEX:
        return relative_position_index(window).to(torch.int64), why
    if scale is None:
        why += ', which pre-training is taken to have had, too'
    elif scale != window:
        why += f', pre-trained with {scale}'
    return log_spaced_offsets(window, scale or window), why
