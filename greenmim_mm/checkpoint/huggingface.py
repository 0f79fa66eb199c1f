"""``config.json`` of Hugging Face's transformers, made of an architecture and back."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .architecture import Architecture
from .reading import CheckpointError

_POSITIONS = 'embeddings.position_embeddings'
_CLASSES = {1: 'Swin', 2: 'Swinv2'}


def make_config(
    architecture: Architecture,
    state_dict: Mapping[str, Tensor],
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``config.json`` beside a state dict has to say.

    Args:
        architecture: Sizes of the network.
        state_dict: Parameters under the names of 'huggingface'.
        source: ``config.json`` that came with the parameters; its settings that do not follow
            from the architecture are kept.

    Returns:
        Settings of ``SwinConfig`` or ``Swinv2Config``.

    Raises:
        ValueError: If the windows are not known or transformers has no such network.
    """
    windows = architecture.window_sizes
    if windows is None:
        raise ValueError(
            'the window size does not follow from these parameters and config.json needs it; '
            'give it with --window-size'
        )
    inner_windows = set(windows) if architecture.version == 1 else set(windows[:-1])
    if len(inner_windows) > 1:
        raise ValueError(
            f'transformers has one window size for all stages and this network has {windows}; '
            'resize with --window-size'
        )
    floats = (value.dtype for value in state_dict.values() if value.is_floating_point())
    kept = dict(source or {})
    # Newer releases write the type of the numbers under this name, which wins.
    kept.pop('dtype', None)
    if windows_in_config(kept, architecture.version)[0] != windows:
        kept.pop('image_size', None)
    config = {
        'layer_norm_eps': 1e-5,
        'hidden_act': 'gelu',
        'encoder_stride': 32,
        # The last map is one window.
        'image_size': 8 * architecture.patch_size * windows[-1],
        **kept,
        'model_type': _CLASSES[architecture.version].lower(),
        'patch_size': architecture.patch_size,
        'num_channels': architecture.in_channels,
        'embed_dim': architecture.embed_dims,
        'depths': list(architecture.depths),
        'num_heads': list(architecture.num_heads),
        'window_size': windows[0],
        'mlp_ratio': architecture.mlp_ratio,
        'qkv_bias': kept.get('qkv_bias', architecture.qkv_bias),
        'use_absolute_embeddings': kept.get('use_absolute_embeddings', _POSITIONS in state_dict),
        'torch_dtype': str(next(floats, 'float32')).removeprefix('torch.'),
    }
    if architecture.version == 2:
        config['pretrained_window_sizes'] = list(architecture.foreign_scale or (0,) * len(windows))
    stages = [f'stage{s}' for s in range(1, 5)]
    stages = [name for name in stages if f'hidden_states_norms.{name}.weight' in state_dict]
    classifier = state_dict.get('classifier.weight')
    if classifier is not None:
        head = 'ForImageClassification'
    elif 'decoder.0.weight' in state_dict:
        head = 'ForMaskedImageModeling'
    # The backbone of V2 has no norms of stages, and alone none behind its last one.
    elif stages or (architecture.version == 2 and not architecture.output_norms):
        head = 'Backbone'
    else:
        head = 'Model'
    config['architectures'] = [_CLASSES[architecture.version] + head]
    for name in ('out_features', 'out_indices'):
        config.pop(name, None)
    if head == 'Backbone':
        config['out_features'] = stages or kept.get('out_features') or ['stage4']
    if classifier is not None and len(kept.get('id2label', ())) != len(classifier):
        for name in ('id2label', 'label2id'):
            config.pop(name, None)
        config['num_labels'] = len(classifier)
    return config


def check_settings(config: Mapping[str, Any], canonical: Mapping[str, Tensor]) -> None:
    """Refuse settings by which a network is another than the Swin of all other libraries.

    Args:
        config: ``config.json`` of a Swin.
        canonical: The parameters beside it, under canonical names.

    Raises:
        CheckpointError: If there is one; the message names it.
    """
    act, eps = config.get('hidden_act', 'gelu'), config.get('layer_norm_eps', 1e-5)
    if act != 'gelu':
        raise CheckpointError(
            f'config.json has hidden_act {act!r}; the Swins of other libraries have gelu'
        )
    if not isinstance(eps, (int, float)) or not math.isclose(eps, 1e-5, rel_tol=1e-3):
        raise CheckpointError(
            f'config.json has layer_norm_eps {eps!r}; the Swins of other libraries have 1e-05'
        )
    if config.get('use_absolute_embeddings', False):
        raise CheckpointError(
            'config.json has use_absolute_embeddings; other formats have no place for '
            "transformers' absolute position embedding"
        )
    biases = ('.attn.w_msa.qkv.bias', '.attn.w_msa.q_bias')
    there = any(key.endswith(biases) for key in canonical)
    if bool(config.get('qkv_bias', True)) != there:
        raise CheckpointError(
            f'config.json has qkv_bias {config.get("qkv_bias", True)!r}, but the parameters '
            f'{"have such biases" if there else "have none"}; transformers runs another network '
            'than they alone tell of'
        )


def windows_in_config(
    config: Mapping[str, Any], version: int
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Windows in use and, of a Swin V2, in pre-training; None for what is not told.

    Args:
        config: ``config.json`` of a Swin.
        version: Version of Swin, 1 or 2.

    Raises:
        CheckpointError: If it is of another network than a Swin.
    """
    kind = config.get('model_type')
    if kind is not None and kind not in {name.lower() for name in _CLASSES.values()}:
        raise CheckpointError(f'config.json is of a {kind!r}, not of a Swin')
    settings = (('window_size', None), ('image_size', 224), ('patch_size', 4))
    window, size, patch = (config.get(name, default) for name, default in settings)
    if not all(isinstance(value, int) and value > 0 for value in (window, size, patch)):
        return None, None
    windows = (window,) * 4
    if version == 2:  # a window larger than its map shrinks
        windows = tuple(min(window, max(size // patch >> stage, 1)) for stage in range(4))
    sizes = config.get('pretrained_window_sizes', [0, 0, 0, 0])
    if not isinstance(sizes, list) or len(sizes) != 4:
        return windows, None
    if any(type(size) is not int or size < 0 for size in sizes):
        return windows, None
    # 0 stands for the window in use.
    return windows, tuple(size or window for size, window in zip(sizes, windows, strict=True))
