"""``ShapeSpec``, as detectron2 defines it."""

from dataclasses import dataclass


@dataclass
class ShapeSpec:
    """Shape of a feature."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
