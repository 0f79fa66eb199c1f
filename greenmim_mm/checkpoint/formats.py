"""How each format names the parameters of a Swin.

The canonical names are GreenSwin's own, which mmdet and mmpretrain share (``stages.0.blocks.0
.attn.w_msa.qkv.weight``), with ``neck.`` before what belongs to the pre-training decoder. A
format is a table of pairs (canonical, foreign), read in either direction. ``{s}`` stands for a
stage, ``{b}`` for a block and ``{p}`` for ``weight`` or ``bias``.

Besides names one thing differs: the channel order of patch merging. A cell of 2x2 tokens with
``C`` channels is one vector of ``4 * C``. OpenMMLab takes it from ``nn.Unfold``: channel first,
inside it the place, row by row. Microsoft's code takes the place first, column by column.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_PLACEHOLDERS = {'s': r'(?P<s>\d+)', 'b': r'(?P<b>\d+)', 'p': r'(?P<p>weight|bias)'}


@dataclass(frozen=True)
class Format:
    """Naming of one family of checkpoints.

    Attributes:
        name: Name of the format.
        description: Whose files these are.
        renames: Pairs of templates (canonical name, foreign name).
        merge_order: 'unfold' (OpenMMLab) or 'columns' (Microsoft): channels of patch merging.
        licence: Licence note that the files carry along, or None.
        wrapper: Key under which a file keeps its parameters.
        ignored: Patterns of foreign keys that hold nothing learned and can be computed.
    """

    name: str
    description: str
    renames: tuple[tuple[str, str], ...]
    merge_order: str = 'unfold'
    licence: str | None = None
    wrapper: str = 'state_dict'
    ignored: tuple[str, ...] = ()

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern, re.Pattern, str, str], ...]:
        return tuple((_pattern(own), _pattern(other), own, other) for own, other in self.renames)

    def to_canonical(self, key: str) -> str | None:
        """Canonical name of a foreign key, or None if the table does not know it."""
        for _, pattern, own, _ in self._patterns:
            if match := pattern.fullmatch(key):
                return own.format(**match.groupdict())
        return None

    def from_canonical(self, key: str) -> str | None:
        """Foreign name of a canonical key, or None if the format has no place for it."""
        for pattern, _, _, other in self._patterns:
            if match := pattern.fullmatch(key):
                return other.format(**match.groupdict())
        return None

    def ignores(self, key: str) -> bool:
        """Whether a foreign key holds nothing learned."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)


def _pattern(template: str) -> re.Pattern:
    parts = re.split(r'\{(\w)\}', template)
    return re.compile(
        ''.join(
            _PLACEHOLDERS[part] if index % 2 else re.escape(part)
            for index, part in enumerate(parts)
        )
    )


_ATTENTION = ('relative_position_bias_table', 'relative_position_index', 'qkv.{p}', 'proj.{p}')
_BLOCK = 'stages.{s}.blocks.{b}.'

_BACKBONE = (
    *((_BLOCK + f'attn.w_msa.{leaf}', _BLOCK + f'attn.w_msa.{leaf}') for leaf in _ATTENTION),
    *(
        (name, name)
        for name in (
            'patch_embed.projection.{p}',
            'patch_embed.norm.{p}',
            _BLOCK + 'norm1.{p}',
            _BLOCK + 'norm2.{p}',
            _BLOCK + 'ffn.layers.0.0.{p}',
            _BLOCK + 'ffn.layers.1.{p}',
            'stages.{s}.downsample.norm.{p}',
            'stages.{s}.downsample.reduction.{p}',
            'norm{s}.{p}',
        )
    ),
)

_DECODER_BLOCK = 'decoder_blocks.{b}.'
_DECODER = (
    'mask_token',
    'decoder_embed.{p}',
    _DECODER_BLOCK + 'norm1.{p}',
    _DECODER_BLOCK + 'attn.qkv.{p}',
    _DECODER_BLOCK + 'attn.proj.{p}',
    _DECODER_BLOCK + 'norm2.{p}',
    _DECODER_BLOCK + 'mlp.fc1.{p}',
    _DECODER_BLOCK + 'mlp.fc2.{p}',
    'decoder_norm.{p}',
    'decoder_pred.{p}',
)

_MICROSOFT_BLOCK = 'layers.{s}.blocks.{b}.'
# Microsoft's code has one norm behind the last stage; all its Swins have four stages.
_MICROSOFT = (
    ('patch_embed.projection.{p}', 'patch_embed.proj.{p}'),
    ('patch_embed.norm.{p}', 'patch_embed.norm.{p}'),
    *((_BLOCK + f'attn.w_msa.{leaf}', _MICROSOFT_BLOCK + f'attn.{leaf}') for leaf in _ATTENTION),
    (_BLOCK + 'norm1.{p}', _MICROSOFT_BLOCK + 'norm1.{p}'),
    (_BLOCK + 'norm2.{p}', _MICROSOFT_BLOCK + 'norm2.{p}'),
    (_BLOCK + 'ffn.layers.0.0.{p}', _MICROSOFT_BLOCK + 'mlp.fc1.{p}'),
    (_BLOCK + 'ffn.layers.1.{p}', _MICROSOFT_BLOCK + 'mlp.fc2.{p}'),
    ('stages.{s}.downsample.norm.{p}', 'layers.{s}.downsample.norm.{p}'),
    ('stages.{s}.downsample.reduction.{p}', 'layers.{s}.downsample.reduction.{p}'),
    ('norm3.{p}', 'norm.{p}'),
)


def _prefixed(pairs: tuple[tuple[str, str], ...], prefix: str) -> tuple[tuple[str, str], ...]:
    return tuple((own, prefix + other) for own, other in pairs)


FORMATS: Mapping[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            'greenmim_mm',
            'GreenMIM pre-training with this package (backbone and decoder)',
            _prefixed(_BACKBONE, 'backbone.')
            + tuple(('neck.' + name, 'neck.' + name) for name in _DECODER),
            ignored=(r'data_preprocessor\..*',),
        ),
        Format(
            'mmdet',
            "backbone of a detector, for mmdet.SwinTransformer's init_cfg",
            _prefixed(_BACKBONE, 'backbone.'),
            ignored=(r'data_preprocessor\..*',),
        ),
        Format(
            'mmpretrain',
            'backbone of a classifier, for mmpretrain.SwinTransformer',
            _prefixed(_BACKBONE, 'backbone.'),
            ignored=(r'data_preprocessor\..*',),
        ),
        Format(
            'greenmim',
            "the GreenMIM authors' pre-training files",
            _prefixed(_MICROSOFT, 'encoder.') + tuple(('neck.' + name, name) for name in _DECODER),
            merge_order='columns',
            licence='weights published by the GreenMIM authors are CC BY-NC 4.0',
            wrapper='model',
            ignored=(r'.*\.attn_mask', r'decoder_pos_embed'),
        ),
    )
}


def detect_format(keys: list[str]) -> str:
    """Name of the format whose table knows the keys.

    mmdet's and mmpretrain's backbones have the same names; the answer then is 'mmdet'.

    Args:
        keys: Names of the parameters.

    Raises:
        ValueError: If no format knows more than half of the keys.
    """
    known = {
        name: sum(entry.to_canonical(key) is not None for key in keys)
        for name, entry in FORMATS.items()
    }
    best = max(known.values())
    if best * 2 <= len(keys):
        raise ValueError(
            'no known Swin format: '
            + ', '.join(
                f'{name} knows {count} of {len(keys)} keys' for name, count in known.items()
            )
            + f'; first keys: {list(keys)[:3]}'
        )
    names = [name for name, count in known.items() if count == best]
    if 'greenmim_mm' in names and not any(key.startswith('neck.') for key in keys):
        names.remove('greenmim_mm')
    return names[0]
