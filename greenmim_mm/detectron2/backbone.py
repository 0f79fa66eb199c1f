"""The backbones: the package's own, with detectron2's interface."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.modeling import Backbone, ShapeSpec
from mmengine.model import initialize
from torch import Tensor

from .. import models
from ..checkpoint import CheckpointError, Network, read_network, resize, spell

STRIDES = (4, 8, 16, 32)


class _Features:
    """What detectron2 asks of a backbone, before a network that returns a tuple of maps."""

    def _set_up(
        self,
        out_features: Sequence[str] | None,
        size_divisibility: int,
        square_pad: int,
    ) -> None:
        names = (
            [f'p{stage}' for stage in self.out_indices] if out_features is None else out_features
        )
        names = tuple(names)
        if len(set(names)) != len(self.out_indices) or len(names) != len(self.out_indices):
            raise ValueError(
                f'out_features={names} must be {len(self.out_indices)} names, one for each of '
                f'out_indices={self.out_indices}'
            )
        if size_divisibility < 0 or square_pad < 0:
            raise ValueError(
                f'size_divisibility={size_divisibility} and square_pad={square_pad} are pixels; 0 '
                'for none'
            )
        self._out_features = list(names)
        self._out_feature_strides = {
            name: STRIDES[stage] for name, stage in zip(names, self.out_indices, strict=True)
        }
        self._out_feature_channels = {
            name: self.num_features[stage]
            for name, stage in zip(names, self.out_indices, strict=True)
        }
        self._size_divisibility, self._square_pad = size_divisibility, square_pad

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images ``(B, 3, H, W)`` to maps ``(B, C_i, H / s_i, W / s_i)`` by name.

        Heights and widths need not be multiples of a stride: maps are rounded up.
        """
        return dict(zip(self._out_features, super().forward(x), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature."""
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._out_features
        }

    @property
    def size_divisibility(self) -> int:
        """Sides of images in a batch are padded to a multiple of it; 0 for none."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """How images of a batch are padded, as ``ImageList.from_tensors`` reads it."""
        return {'size_divisibility': self._size_divisibility, 'square_size': self._square_pad}


class GreenSwin(_Features, models.GreenSwin, Backbone):
    """:class:`greenmim_mm.models.GreenSwin` as a backbone of detectron2.

    Arguments may be what LazyConfig makes of lists and dicts.

    Args:
        arch: 'tiny', 'small', 'base', 'large', or sizes, see the class in ``models``.
        window_size: Windows of attention, one for all stages or one for each; None: those of
            ``checkpoint``, and 7 without one.
        out_indices: Stages that give a feature.
        out_features: Their names; None: 'p0' to 'p3', as of detectron2's Swin.
        pad_small_map: True as in detectron2's Swin and mmdet: maps smaller than a window are
            padded to it.
        size_divisibility: Sides of a batch of images are padded to a multiple of it.
        square_pad: Images of a batch are padded to squares of this side in pixels; 0: not. (An
            FPN has an argument of this name of its own.)
        checkpoint: File of any of the nine formats, whose backbone is loaded strictly.
        **kwargs: As of the class in ``models``: ``drop_path_rate``, ``frozen_stages``,
            ``with_cp``, and so on.

    Raises:
        ValueError: For an argument that makes no sense; the message names it.
        FileNotFoundError, CheckpointError: If the checkpoint is not there, is damaged, or holds
            another network.
    """

    version = 1
    default_window = 7

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        window_size: int | Sequence[int] | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_features: Sequence[str] | None = None,
        pad_small_map: bool = True,
        size_divisibility: int = 32,
        square_pad: int = 0,
        checkpoint: str | None = None,
        **kwargs: Any,
    ) -> None:
        network = None if checkpoint is None else read_network(checkpoint)
        arguments = dict(
            arch=plain(arch),
            window_size=_windows(plain(window_size), network, self.default_window),
            out_indices=plain(out_indices),
            pad_small_map=pad_small_map,
            **{name: plain(value) for name, value in kwargs.items()},
        )
        super().__init__(**arguments | self._of_checkpoint(network, arguments))
        self._set_up(plain(out_features), size_divisibility, square_pad)
        # Not init_weights: unless a runner called it, it prints every parameter.
        initialize(self, self.init_cfg)
        self._init_from_scratch()
        if network is not None:
            self._load(network, checkpoint)

    def _of_checkpoint(self, network: Network | None, arguments: Mapping[str, Any]) -> dict:
        """Further arguments that a checkpoint decides."""
        return {}

    def _load(self, network: Network, path: str) -> None:
        """Fill all parameters but norms of outputs that the checkpoint has not."""
        if network.architecture.version != self.version:
            raise CheckpointError(
                f'{path} holds a Swin V{network.architecture.version}; {type(self).__name__} is a '
                f'Swin V{self.version}'
            )
        scale = None
        if self.version == 2 and network.architecture.pretrained_window_sizes is None:
            scale = _in_use(self.pretrained_window_sizes, self.window_sizes)
        spelled = spell(resize(network, self.window_sizes, scale), 'greenmim_mm').state_dict
        prefix = 'backbone.'
        values = {
            key.removeprefix(prefix): value
            for key, value in spelled.items()
            if key.startswith(prefix)
        }
        own = self.state_dict()
        norms = {name for name in {*own, *values} if name[:4] == 'norm' and name[4:5].isdigit()}
        wrong = (own.keys() ^ values.keys()) - norms
        wrong |= {
            name for name in own.keys() & values.keys() if own[name].shape != values[name].shape
        }
        if wrong:
            found = network.architecture
            raise CheckpointError(
                f'{path} holds another network than arch={self.arch}: {len(wrong)} of {len(own)} '
                f'values differ in name or shape, e.g. {min(wrong)}; it holds '
                f'embed_dims={found.embed_dims}, depths={found.depths}'
            )
        self.load_state_dict({name: values[name] for name in own if name in values}, strict=False)


class GreenSwinV2(GreenSwin, models.GreenSwinV2):
    """:class:`greenmim_mm.models.GreenSwinV2` as a backbone of detectron2.

    Args:
        pretrained_window_sizes: Windows of pre-training, one for each stage; None: those of
            ``checkpoint``, without one the windows in use.
        **kwargs: As of :class:`GreenSwin`. ``window_size`` is 8 where nothing says otherwise.
    """

    version = 2
    default_window = 8

    def __init__(
        self, *args: Any, pretrained_window_sizes: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, pretrained_window_sizes=pretrained_window_sizes, **kwargs)

    def _of_checkpoint(self, network: Network | None, arguments: Mapping[str, Any]) -> dict:
        told = None if network is None else network.architecture.pretrained_window_sizes
        given = arguments['pretrained_window_sizes']
        if told is not None and given is not None:
            if _in_use(given, arguments['window_size']) != told:
                raise ValueError(
                    f'pretrained_window_sizes={tuple(given)}: the checkpoint was pre-trained with '
                    f'{told}'
                )
        return dict(pretrained_window_sizes=told or given or (0, 0, 0, 0))


def plain(value: Any) -> Any:
    """Lists and dicts of LazyConfig (omegaconf) as Python's tuples and dicts, at any depth."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(plain(item) for item in value)
    return value


def _windows(
    window_size: int | tuple[int, ...] | None, network: Network | None, default: int
) -> int | tuple[int, ...]:
    if window_size is not None:
        return window_size
    if network is None:
        return default
    if network.architecture.window_sizes is None:
        raise ValueError(
            'window_size is not told: neither an argument nor the checkpoint says which windows'
        )
    return network.architecture.window_sizes


def _in_use(pretrained: Sequence[int], window_size: int | Sequence[int]) -> tuple[int, ...]:
    """Windows of pre-training, where 0 stands for the window in use."""
    windows = (window_size,) * 4 if isinstance(window_size, int) else window_size
    return tuple(old or new for old, new in zip(pretrained, windows, strict=True))
