"""What a checkpoint file is."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..text import MAX_LENGTH, printable
from .architecture import Architecture
from .building import build_line
from .formats import AUTO, FORMATS
from .layouts import BUFFERS
from .network import Network, read_network
from .notes import sha256

# A file with a checksum that differs is not inspected but refused, with the name of the key.
_CHECKED = {
    'tensors': 'verified (a checksum of each tensor)',
    'records': 'verified (CRC-32 of each record of the archive)',
    None: 'not verified: the file carries no checksum',
}


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_checkpoint` found.

    Attributes:
        path: The file or folder.
        format: Name of its format.
        kind: What it was made for, e.g. 'GreenMIM pre-training' or 'classifier (1000 classes)'.
        architecture: The network.
        dtypes: Types of the numbers, the most frequent first.
        num_parameters: How many numbers the backbone has learned.
        num_others: How many numbers the other parts have learned.
        num_keys: How many tensors there are.
        size: Bytes of the file with the parameters.
        sha256: Its SHA-256, hexadecimal.
        meta: What the file says about itself.
        licence: Licence note that comes with it or its format, or None.
        others: What else it holds, e.g. 'optimizer'.
        usage: The line of Python that builds its model, see :func:`build_line`.
        checked: By which checksums it was found to be whole, see :class:`Checkpoint`.
    """

    path: Path
    format: str
    kind: str
    architecture: Architecture
    dtypes: tuple[str, ...]
    num_parameters: int
    num_others: int
    num_keys: int
    size: int
    sha256: str
    meta: dict[str, Any]
    licence: str | None
    others: tuple[str, ...]
    usage: str
    checked: str | None

    def summary(self) -> str:
        """All of it, a line each."""
        arch = self.architecture
        windows = arch.window_sizes
        lines = {
            'file': f'{self.path} ({self.size / 1e6:.1f} MB)',
            'sha256': self.sha256,
            'numbers are': _CHECKED[self.checked],
            'format': f'{self.format} ({FORMATS[self.format].description})',
            'kind': self.kind,
            'network': f'Swin V{arch.version} {arch.name or "of its own size"}',
            'embed_dims': arch.embed_dims,
            'depths': _joined(arch.depths),
            'num_heads': _joined(arch.num_heads),
            'window_size': ('not told by the parameters' if windows is None else _joined(windows)),
            'mlp_ratio': f'{arch.mlp_ratio:g}',
            'qkv_bias': arch.qkv_bias,
            'in_channels': arch.in_channels,
            'norms of outputs': _joined(arch.output_norms) or 'none',
            'numbers': ', '.join(self.dtypes),
            'parameters': f'{self.num_parameters:,} in the backbone, {self.num_others:,} beside it '
            f'({self.num_keys} tensors)',
        }
        if arch.version == 2:
            scale = arch.pretrained_window_sizes
            lines['pre-trained with'] = (
                'windows not told' if scale is None else f'windows {_joined(scale)}'
            )
        for name in ('epoch', 'iter', 'step'):
            if name in self.meta:
                lines[name] = self.meta[name]
        lines['licence'] = self.licence or 'not stated'
        shown = {'epoch', 'iter', 'step', 'licence'}
        for key, value in self.meta.items():
            if key not in shown:
                lines[f'meta {printable(key)}'] = value
        lines['also holds'] = ', '.join(self.others) or 'nothing'
        lines['build it with'] = self.usage
        width = max(map(len, lines))
        # A line of Python is of use as a whole.
        return '\n'.join(
            f'{name:{width}}  {printable(value, 1000 if value is self.usage else MAX_LENGTH)}'
            for name, value in lines.items()
        )


def inspect_checkpoint(path: str | Path, source: str = AUTO, trust: bool = False) -> Inspection:
    """Find out what a checkpoint is; arguments and errors are those of :func:`read_network`."""
    network = read_network(path, source, trust)
    checkpoint, architecture = network.checkpoint, network.architecture
    state_dict = checkpoint.state_dict
    learned = {k: v for k, v in state_dict.items() if v.is_floating_point()}
    backbone = ('patch_embed.', 'stages.', 'norm')
    inside = _count({k: v for k, v in network.state_dict.items() if k.startswith(backbone)})
    dtypes = Counter(str(value.dtype).removeprefix('torch.') for value in learned.values())
    return Inspection(
        path=checkpoint.path,
        format=network.source,
        kind=_kind(network),
        architecture=architecture,
        dtypes=tuple(name for name, _ in dtypes.most_common()),
        num_parameters=inside,
        num_others=_count(learned) - inside,
        num_keys=len(state_dict),
        size=checkpoint.weights_file.stat().st_size,
        sha256=sha256(checkpoint.weights_file),
        meta=checkpoint.meta,
        licence=network.licence,
        others=tuple(name for name in checkpoint.left_out if name != 'meta'),
        usage=build_line(architecture, network.source, path, state_dict, checkpoint.config),
        checked=checkpoint.checked,
    )


def _count(parameters: Mapping[str, Tensor]) -> int:
    """How many numbers they have, without those of buffers."""
    return sum(value.numel() for key, value in parameters.items() if not key.endswith(BUFFERS))


def _kind(network: Network) -> str:
    """What a network was made for."""
    names = network.state_dict
    if (head := names.get('head.fc.weight')) is not None:
        return f'classifier ({len(head)} classes)'
    if any(name.startswith('neck.decoder.') for name in names) or 'mask_token' in names:
        return 'SimMIM pre-training'
    if any(name.startswith('neck.') for name in names):
        return 'GreenMIM pre-training'
    parts = dict.fromkeys(key.split('.')[0] for key in network.checkpoint.state_dict)
    if parts.keys() & {'rpn_head', 'roi_head', 'bbox_head', 'proposal_generator'}:
        return f'detector ({", ".join(filter(None, parts))})'
    if set(network.architecture.output_norms) - {3}:
        return 'backbone with norms for several outputs, as in a detector'
    return 'backbone alone'


def _joined(values: tuple[int, ...]) -> str:
    return ', '.join(map(str, values))
