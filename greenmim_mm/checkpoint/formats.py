"""The formats: how each names the parameters of a Swin, and which of them a file has.

The canonical names are GreenSwin's own, which mmdet and mmpretrain share (``stages.0.blocks.0
.attn.w_msa.qkv.weight``), without ``backbone.``; what belongs to pre-training has ``neck.``, a
classifier ``head.fc``. Swin V2 has the names of ``mmpretrain.SwinTransformerV2``.

A format has one layout or more for each version of Swin: a file of transformers, for example,
may be a whole classifier or a backbone with a norm per stage. The layout that knows most of the
names is taken, the first of equals. Another format is one more entry of :data:`FORMATS`.
"""

from collections.abc import Collection, Iterable, Mapping

from ..archs import FORMAT_NAMES
from .layouts import (
    BUFFERS,
    COLUMNS_V1,
    COLUMNS_V2,
    COORDS,
    FLAT_INDEX,
    INDEX,
    KEY_BIAS,
    SPLIT_V1,
    SPLIT_V2,
    TABLE,
    Format,
    Layout,
    count_known,
)

# Stands for the format that knows the names of a file.
AUTO = 'auto'
_BLOCK = 'stages.{s}.blocks.{b}.'
_ATTENTION = _BLOCK + 'attn.w_msa.'
_INDEX, _COORDS = _ATTENTION + INDEX, _ATTENTION + COORDS

_COMMON = (
    'patch_embed.projection.{p}',
    'patch_embed.norm.{p}',
    _BLOCK + 'norm1.{p}',
    _ATTENTION + 'proj.{p}',
    _BLOCK + 'norm2.{p}',
    _BLOCK + 'ffn.layers.0.0.{p}',
    _BLOCK + 'ffn.layers.1.{p}',
)
_V1 = (
    *_COMMON,
    _ATTENTION + TABLE,
    'stages.{d}.downsample.norm.{p}',
    'stages.{d}.downsample.reduction.weight',
)
_V2 = (
    *_COMMON,
    _ATTENTION + 'logit_scale',
    _ATTENTION + 'cpb_mlp.0.{p}',
    _ATTENTION + 'cpb_mlp.2.weight',
    'stages.{d+1}.downsample.norm.{p}',
    'stages.{d+1}.downsample.reduction.weight',
)
_QKV_V1 = (_ATTENTION + 'qkv.{p}',)
_QKV_V2 = (_ATTENTION + 'qkv.weight', _ATTENTION + 'q_bias', _ATTENTION + 'v_bias')
# Not canonical: names for the parts that some formats keep apart or together.
_SPLIT_QKV_V1 = tuple(_ATTENTION + part + '.{p}' for part in 'qkv')
_SPLIT_QKV_V2 = (
    *(_ATTENTION + part + '.weight' for part in 'qkv'),
    _ATTENTION + 'q_bias',
    _ATTENTION + 'v_bias',
)
_BUFFERS_V2 = (_INDEX, _COORDS)
# Only mmpretrain's huge and giant models have it.
_EXTRA_NORM = (_BLOCK + 'norm3.{p}',)

_ALL_NORMS = tuple(f'norm{stage}.{{p}}' for stage in range(4))
_LAST_NORM = ('norm3.{p}',)
_HEAD = ('head.fc.{p}',)
_ABSOLUTE = ('absolute_pos_embed',)
_SIMMIM = ('mask_token', 'neck.decoder.0.{p}')
_GREENMIM = (
    'neck.mask_token',
    'neck.decoder_embed.{p}',
    'neck.decoder_blocks.{b}.norm1.{p}',
    'neck.decoder_blocks.{b}.attn.qkv.{p}',
    'neck.decoder_blocks.{b}.attn.proj.{p}',
    'neck.decoder_blocks.{b}.norm2.{p}',
    'neck.decoder_blocks.{b}.mlp.fc1.{p}',
    'neck.decoder_blocks.{b}.mlp.fc2.{p}',
    'neck.decoder_norm.{p}',
    'neck.decoder_pred.{p}',
)

_OPENMMLAB_V1 = _V1 + _QKV_V1 + (_INDEX,) + _ALL_NORMS
_OPENMMLAB_V2 = _V2 + _QKV_V2 + _BUFFERS_V2 + _EXTRA_NORM + _ALL_NORMS

_MICROSOFT_SPELLING = (
    ('patch_embed.projection', 'patch_embed.proj'),
    ('stages.{d+1}.downsample', 'layers.{d}.downsample'),
    ('stages.', 'layers.'),
    ('attn.w_msa.', 'attn.'),
    ('ffn.layers.0.0', 'mlp.fc1'),
    ('ffn.layers.1', 'mlp.fc2'),
    ('norm3.', 'norm.'),
    ('head.fc', 'head'),
    ('neck.', ''),
)
# timm merges before a stage, not after it.
_TIMM_SPELLING = (
    ('stages.{d}.downsample', 'layers.{d+1}.downsample'),
    ('stages.{d+1}.downsample', 'layers.{d+1}.downsample'),
    ('head.fc', 'head.fc'),
    *_MICROSOFT_SPELLING,
)
# Detectors have a norm per output.
_DETECTRON2_SPELLING = (('norm3.', 'norm3.'), *_MICROSOFT_SPELLING)
_TORCHVISION_SPELLING = (
    ('patch_embed.projection', 'features.0.0'),
    ('patch_embed.norm', 'features.0.2'),
    ('stages.{s}.blocks.{b}', 'features.{2s+1}.{b}'),
    ('stages.{d}.downsample', 'features.{2d+2}'),
    ('stages.{d+1}.downsample', 'features.{2d+2}'),
    ('attn.w_msa.', 'attn.'),
    ('ffn.layers.0.0', 'mlp.0'),
    ('ffn.layers.1', 'mlp.3'),
    ('norm3.', 'norm.'),
    ('head.fc', 'head'),
)
_HUGGINGFACE_SPELLING = (
    ('patch_embed.projection', 'embeddings.patch_embeddings.projection'),
    ('patch_embed.norm', 'embeddings.norm'),
    ('mask_token', 'embeddings.mask_token'),
    ('stages.{d+1}.downsample', 'encoder.layers.{d}.downsample'),
    ('stages.', 'encoder.layers.'),
    ('.norm1.', '.layernorm_before.'),
    ('.norm2.', '.layernorm_after.'),
    ('attn.w_msa.q_bias', 'attention.self.query.bias'),
    ('attn.w_msa.v_bias', 'attention.self.value.bias'),
    ('attn.w_msa.q.', 'attention.self.query.'),
    ('attn.w_msa.k.', 'attention.self.key.'),
    ('attn.w_msa.v.', 'attention.self.value.'),
    ('attn.w_msa.proj', 'attention.output.dense'),
    ('attn.w_msa.cpb_mlp', 'attention.self.continuous_position_bias_mlp'),
    ('attn.w_msa.', 'attention.self.'),
    ('ffn.layers.0.0', 'intermediate.dense'),
    ('ffn.layers.1', 'output.dense'),
    ('norm3.', 'layernorm.'),
    ('head.fc', 'classifier'),
    ('neck.', ''),
)
_HUGGINGFACE_NORMS = tuple(
    (f'norm{stage}.', f'hidden_states_norms.stage{stage + 1}.') for stage in range(4)
)


def _layouts(prefixes: Iterable[str], **arguments) -> tuple[Layout, ...]:
    """The same layout with several prefixes; files are written with the first."""
    return tuple(Layout(prefix=prefix, **arguments) for prefix in prefixes)


def _openmmlab(more: tuple[str, ...], model_has: tuple[str, ...]) -> tuple[Layout, ...]:
    arguments = dict(model_has=model_has, whole_models=True)
    prefixes = ('backbone.', '')
    return (
        *_layouts(prefixes, version=1, names=_OPENMMLAB_V1 + more, **arguments),
        *_layouts(prefixes, version=2, names=_OPENMMLAB_V2 + more, **arguments),
    )


def _microsoft_layouts() -> Iterable[Layout]:
    names_v1 = _V1 + _QKV_V1 + (_INDEX,) + _ABSOLUTE + _LAST_NORM
    names_v2 = _V2 + _QKV_V2 + _BUFFERS_V2 + _ABSOLUTE + _LAST_NORM
    for version, names, transforms in ((1, names_v1, COLUMNS_V1), (2, names_v2, COLUMNS_V2)):
        shared = dict(version=version, spelling=_MICROSOFT_SPELLING, transforms=transforms)
        yield Layout(names=names + _HEAD, model_has=_LAST_NORM + _HEAD, **shared)
        # SimMIM pre-training.
        simmim = dict(names=names + _SIMMIM, prefix='encoder.', model_has=_LAST_NORM)
        yield Layout(**simmim, **shared)
        if version == 2:
            # As Microsoft's published files have it; their own loader renames it.
            shared['spelling'] = (('attn.w_msa.cpb_mlp', 'attn.rpe_mlp'), *_MICROSOFT_SPELLING)
            yield Layout(**simmim, **shared)


def _huggingface_layouts() -> Iterable[Layout]:
    shared = dict(version=1, transforms=COLUMNS_V1 + SPLIT_V1)
    names = _V1 + _SPLIT_QKV_V1 + (_INDEX,)
    plain = dict(spelling=_HUGGINGFACE_SPELLING, model_has=_LAST_NORM, **shared)
    # SwinModel, SwinForImageClassification or SwinForMaskedImageModeling, SwinBackbone.
    yield Layout(names=names + _LAST_NORM, **plain)
    yield Layout(names=names + _LAST_NORM + _HEAD + _SIMMIM, prefix='swin.', **plain)
    yield Layout(
        names=names + _ALL_NORMS, spelling=_HUGGINGFACE_NORMS + _HUGGINGFACE_SPELLING, **shared
    )
    names = _V2 + _SPLIT_QKV_V2 + _LAST_NORM
    shared.update(version=2, transforms=COLUMNS_V2 + SPLIT_V2)
    shared.update(spelling=_HUGGINGFACE_SPELLING, model_has=_LAST_NORM)
    yield Layout(names=names, **shared)
    yield Layout(names=names + _HEAD + _SIMMIM, prefix='swinv2.', **shared)


_MASK = (r'.*\.attn_mask',)
_COMPUTED = tuple(rf'.*\.{name}' for name in BUFFERS)
_PREPROCESSOR = (r'data_preprocessor\..*',)

FORMATS: Mapping[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            'greenmim_mm',
            FORMAT_NAMES['greenmim_mm'],
            _openmmlab(_HEAD + _GREENMIM, _LAST_NORM),
            ignored=_PREPROCESSOR,
        ),
        Format(
            'mmdet',
            FORMAT_NAMES['mmdet'],
            _openmmlab(_ABSOLUTE, _ALL_NORMS),
            ignored=_PREPROCESSOR,
        ),
        Format(
            'mmpretrain',
            FORMAT_NAMES['mmpretrain'],
            _openmmlab(_HEAD + _SIMMIM + _ABSOLUTE, _LAST_NORM),
            ignored=_PREPROCESSOR,
        ),
        Format(
            'greenmim',
            FORMAT_NAMES['greenmim'],
            (
                Layout(
                    version=1,
                    names=_V1 + _QKV_V1 + (_INDEX,) + _LAST_NORM + _GREENMIM,
                    spelling=_MICROSOFT_SPELLING,
                    prefix='encoder.',
                    transforms=COLUMNS_V1,
                    model_has=_LAST_NORM,
                ),
            ),
            licence='weights published by the GreenMIM authors are CC BY-NC 4.0',
            wrapper='model',
            ignored=(*_MASK, 'decoder_pos_embed'),
            refused={2: "the authors' code has none"},
        ),
        Format(
            'microsoft',
            FORMAT_NAMES['microsoft'],
            tuple(_microsoft_layouts()),
            wrapper='model',
            ignored=_MASK,
        ),
        Format(
            'timm',
            FORMAT_NAMES['timm'],
            tuple(
                Layout(
                    version=version,
                    names=names + _LAST_NORM + _HEAD,
                    spelling=_TIMM_SPELLING,
                    transforms=transforms,
                    model_has=_LAST_NORM + _HEAD,
                )
                for version, names, transforms in (
                    (1, _V1 + _QKV_V1, COLUMNS_V1),
                    (2, _V2 + _QKV_V2, COLUMNS_V2),
                )
            ),
            ignored=_COMPUTED,
        ),
        Format(
            'huggingface',
            FORMAT_NAMES['huggingface'],
            tuple(_huggingface_layouts()),
            wrapper=None,
            ignored=_COMPUTED,
        ),
        Format(
            'torchvision',
            FORMAT_NAMES['torchvision'],
            tuple(
                Layout(
                    version=version,
                    names=names + _LAST_NORM + _HEAD,
                    spelling=_TORCHVISION_SPELLING,
                    transforms=transforms + FLAT_INDEX,
                    model_has=_LAST_NORM + _HEAD,
                )
                for version, names, transforms in (
                    (1, _V1 + _QKV_V1 + (_INDEX,), COLUMNS_V1),
                    (2, _V2 + _QKV_V1 + _BUFFERS_V2, COLUMNS_V2 + KEY_BIAS),
                )
            ),
            wrapper=None,
        ),
        Format(
            'detectron2',
            FORMAT_NAMES['detectron2'],
            _layouts(
                ('backbone.bottom_up.', 'backbone.net.', 'backbone.', ''),
                version=1,
                names=_V1 + _QKV_V1 + (_INDEX,) + _ALL_NORMS,
                spelling=_DETECTRON2_SPELLING,
                transforms=COLUMNS_V1,
                model_has=_ALL_NORMS,
                whole_models=True,
            ),
            wrapper='model',
            ignored=_MASK,
            refused={2: 'the ViTDet project has no Swin V2'},
        ),
    )
}

# Formats that spell backbones alike know equally many keys; a file that is this package's own
# alone has a decoder, too.
_BY_LIKELIHOOD = sorted(FORMATS, key=lambda name: name == 'greenmim_mm')


def detect_format(keys: Collection[str]) -> str:
    """Name of the format whose table knows the keys.

    What several formats know equally well is taken for the likeliest: a backbone with OpenMMLab's
    names for 'mmdet' ('mmpretrain' if it is a Swin V2), one with the names of the GreenMIM
    authors' encoder for 'greenmim'.

    Args:
        keys: Names of the parameters.

    Raises:
        ValueError: If no format knows more than half of the keys, or there are keys of two.
    """
    layouts = {name: entry.source_layout(keys) for name, entry in FORMATS.items()}
    known = {name: count_known(layout.to_canonical, keys) for name, layout in layouts.items()}

    def rank(name: str) -> tuple[int, bool]:
        # mmdet has no Swin V2 of its own.
        return known[name], (name, layouts[name].version) != ('mmdet', 2)

    best = max(_BY_LIKELIHOOD, key=rank)
    layout = layouts[best]
    _check_unmixed(keys, FORMATS[best], layout)
    candidates = keys
    if any(_is_block(layout.to_canonical(key)) for key in keys):
        candidates = [key for key in keys if not layout.is_beside(key)]
    if known[best] * 2 <= len(candidates):
        counts = ', '.join(f'{name} knows {n} of {len(keys)} keys' for name, n in known.items())
        raise ValueError(f'no known Swin format: {counts}; first keys: {list(keys)[:3]}')
    return best


def find_format(name: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: If there is none.
    """
    if name not in FORMATS:
        raise ValueError(f'format {name!r} is unknown; known formats: {", ".join(FORMATS)}')
    return FORMATS[name]


def _check_unmixed(keys: Collection[str], entry: Format, layout: Layout) -> None:
    """Raise ``ValueError`` if keys that ``layout`` does not know are blocks of another format."""
    own = [key for key in keys if layout.to_canonical(key) is not None]
    rest = [key for key in keys if layout.to_canonical(key) is None and not entry.ignores(key)]
    others = {}
    for name in _BY_LIKELIHOOD:
        names = {key: FORMATS[name].to_canonical(key) for key in rest}
        if name != entry.name and any(map(_is_block, names.values())):
            others[name] = [key for key, canonical in names.items() if canonical is not None]
    if others:
        other = max(others, key=lambda name: len(others[name]))
        raise ValueError(
            f'keys of two formats are mixed: {len(own)} of {entry.name}, e.g. {own[0]}, and '
            f'{len(others[other])} of {other}, e.g. {others[other][0]}'
        )


def _is_block(canonical: str | None) -> bool:
    return canonical is not None and '.blocks.' in canonical
