"""Proof that a written file holds the same network: the target's library runs it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import AUTO, Architecture, check_settings, find_format, read_network
from .libraries import LIBRARIES, VerificationError, converted_back, green_swin

TOLERANCE = 1e-4
# Windows that have little in common would need images beyond this side.
_MAX_SIDE = 1536
_NUM_IMAGES = 2


@dataclass(frozen=True)
class Verification:
    """Comparison of a file with GreenSwin.

    Attributes:
        network: What was built and loaded strictly, e.g. 'mmdet.SwinTransformer'.
        differences: Largest difference of each output, relative to its largest value where that
            exceeds 1.
        side: Side of the random images in pixels.
        independent: Whether ``network`` is the code of the target's own library.
        tolerance: Above which difference a comparison fails.
    """

    network: str
    differences: dict[str, float]
    side: int
    independent: bool
    tolerance: float = TOLERANCE

    @property
    def largest(self) -> float:
        """The largest of the differences; NaN if one is."""
        values = list(self.differences.values())
        return math.nan if any(map(math.isnan, values)) else max(values)

    @property
    def passed(self) -> bool:
        """Whether no difference exceeds the tolerance."""
        return self.largest <= self.tolerance

    def summary(self) -> str:
        """What was compared, and the largest difference, in a sentence."""
        how = (
            f'the file loads strictly into {self.network}'
            if self.independent
            else 'no code of another library was run, as PyPI has none for this format: the file '
            f'was converted back and loads strictly into {self.network}'
        )
        return (
            f'{how}; {len(self.differences)} outputs of stages and norms on {_NUM_IMAGES} random '
            f'images of {self.side}x{self.side} pixels differ by at most {self.largest:.1e} in '
            f'float32 (limit {self.tolerance:g})'
        )


def verify(
    src: str | Path, dst: str | Path, source: str = AUTO, target: str = AUTO
) -> Verification:
    """Compare two checkpoints: the first in GreenSwin, the second in the library of its format.

    Args:
        src: Any checkpoint that :func:`~greenmim_mm.checkpoint.load_checkpoint` reads.
        dst: The checkpoint to prove, with windows of the same size.
        source: Format of ``src``; 'auto' finds it out.
        target: Format of ``dst``. OpenMMLab's formats have the same names for a backbone: give
            it to choose between them.

    Returns:
        The differences, none of them above the tolerance.

    Raises:
        VerificationError: If the networks differ, or the library does not accept the file.
        ImportError: If the library is not installed.
        ValueError: If one of them is no Swin.
    """
    first, second = read_network(src, source), read_network(dst, target)
    architecture = first.architecture
    if first.checkpoint.config is not None:
        check_settings(first.checkpoint.config, first.state_dict)
    # Libraries are built by what the first tells; the second must not say otherwise.
    if not architecture.scale_is_known:
        raise ValueError(
            f'{src} does not tell the windows of its pre-training, by which Swin V2 scales '
            'offsets; convert it with --window-size and --pretrained-window-size first'
        )
    _check_windows(architecture, second.architecture)
    return verify_network(Path(dst), second.source, first.state_dict, architecture)


def _check_windows(first: Architecture, second: Architecture) -> None:
    if second.window_sizes not in (None, first.window_sizes):
        raise VerificationError(
            f'this is not the same network: windows {first.window_sizes} and {second.window_sizes}'
        )
    scales = [arch.pretrained_window_sizes for arch in (first, second)]
    if scales[1] not in (None, scales[0]):
        raise VerificationError(
            f'this is not the same network: pre-trained with windows {scales[0]} and {scales[1]}'
        )


def verify_network(
    path: Path, target: str, canonical: Mapping[str, Tensor], architecture: Architecture
) -> Verification:
    """Compare a file with the network of a canonical state dict.

    Args:
        path: File, or folder of Hugging Face's.
        target: Format of the file.
        canonical: Parameters under canonical names.
        architecture: Their architecture, with the windows of the file.

    Raises:
        VerificationError: If the networks differ, or the library does not accept the file.
        ImportError: If the library is not installed.
        ValueError: If the network cannot be run, e.g. because no window size is known.
    """
    find_format(target)
    side = _image_side(architecture)
    build = LIBRARIES.get((target, architecture.version), converted_back)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(_NUM_IMAGES, architecture.in_channels, side, side, generator=generator)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            theirs = build(path, target, architecture, side)
        except (RuntimeError, KeyError) as error:
            # What load_state_dict and from_pretrained raise for keys and shapes.
            raise VerificationError(
                f'{target} does not accept the file: {" ".join(str(error).split())[:500]}'
            ) from error
        ours = green_swin(canonical, architecture, theirs.pad_small_map)
        results = [model.outputs(images) for model in (ours, theirs)]
    stages = [f'stage {stage}' for stage in range(len(architecture.depths))]
    if missing := [name for name in stages if name not in results[1]]:
        raise VerificationError(f'{theirs.network} gives no {missing[0]}')
    differences = {
        name: _difference(value, results[1][name])
        for name, value in results[0].items()
        if name in results[1]
    }
    result = Verification(theirs.network, differences, side, theirs.independent)
    if not result.passed:
        worst = ', '.join(f'{name} {value:.1e}' for name, value in differences.items())
        raise VerificationError(f'this is not the same network: {result.summary()}; {worst}')
    return result


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return math.inf
    scale = max(1.0, float(ours.abs().max()))
    return float((ours - theirs).abs().max()) / scale


def _image_side(architecture: Architecture) -> int:
    """Side at which windows tile every map: padding is where implementations differ."""
    if architecture.window_sizes is None:
        raise ValueError(
            'the window size does not follow from these parameters; give it with --window-size'
        )
    tokens = math.lcm(*(size << stage for stage, size in enumerate(architecture.window_sizes)))
    side = tokens * architecture.patch_size
    if side > _MAX_SIDE:
        raise ValueError(
            f'windows {architecture.window_sizes} tile no image of {_MAX_SIDE} pixels or less; '
            'this network cannot be verified'
        )
    return side
