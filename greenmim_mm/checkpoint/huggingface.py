"""``config.json`` of Hugging Face's transformers, made of an architecture and back."""

import math
from collections.abc import Collection, Mapping
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
    kept = dict(source or {})
    # Newer releases write the type of the numbers under this name, which wins.
    kept.pop('dtype', None)
    if source is not None and config_windows(source, architecture.version) != windows:
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
        'torch_dtype': _dtype(state_dict),
    }
    if architecture.version == 2:
        config['pretrained_window_sizes'] = list(architecture.foreign_scale or (0,) * len(windows))
    head = _head(state_dict)
    if architecture.version == 2 and head == 'Model' and not architecture.output_norms:
        # The backbone of V2 alone has no norm behind its last stage.
        head = 'Backbone'
    config['architectures'] = [_CLASSES[architecture.version] + head]
    stages = [s for s in range(1, 5) if f'hidden_states_norms.stage{s}.weight' in state_dict]
    for name in ('out_features', 'out_indices'):
        config.pop(name, None)
    if stages:
        config['out_features'] = [f'stage{stage}' for stage in stages]
    elif config['architectures'] == ['Swinv2Backbone']:
        config['out_features'] = (source or {}).get('out_features') or ['stage4']
    classifier = state_dict.get('classifier.weight')
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


def config_pretrained(
    config: Mapping[str, Any], windows: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Windows in pre-training that a ``config.json`` of a Swin V2 tells of; None if none.

    Args:
        config: The settings.
        windows: Windows in use, for which a 0 stands.
    """
    sizes = config.get('pretrained_window_sizes', [0, 0, 0, 0])
    if windows is None or not isinstance(sizes, list) or len(sizes) != len(windows):
        return None
    if any(type(size) is not int or size < 0 for size in sizes):
        return None
    return tuple(size or window for size, window in zip(sizes, windows, strict=True))


def config_windows(config: Mapping[str, Any], version: int = 1) -> tuple[int, ...] | None:
    """Windows of the four stages that a ``config.json`` tells of; None if it does not.

    Args:
        config: The settings.
        version: Version of Swin, 1 or 2.

    Raises:
        CheckpointError: If it is of another network than a Swin.
    """
    kind = config.get('model_type')
    if kind is not None and kind not in {name.lower() for name in _CLASSES.values()}:
        raise CheckpointError(f'config.json is of a {kind!r}, not of a Swin')
    window, size, patch = (config.get(k, d) for k, d in _WINDOW_SETTINGS)
    if not all(isinstance(value, int) and value > 0 for value in (window, size, patch)):
        return None
    if version == 2:  # a window larger than its map shrinks
        return tuple(min(window, max(size // patch >> stage, 1)) for stage in range(4))
    return (window,) * 4


_WINDOW_SETTINGS = (('window_size', None), ('image_size', 224), ('patch_size', 4))


def _head(keys: Collection[str]) -> str:
    """What follows the name of the architecture in the name of the class."""
    if 'classifier.weight' in keys:
        return 'ForImageClassification'
    if 'decoder.0.weight' in keys:
        return 'ForMaskedImageModeling'
    if any(key.startswith('hidden_states_norms.') for key in keys):
        return 'Backbone'
    return 'Model'


def _dtype(state_dict: Mapping[str, Tensor]) -> str:
    kinds = [value.dtype for value in state_dict.values() if value.is_floating_point()]
    return str(kinds[0]).removeprefix('torch.') if kinds else 'float32'
