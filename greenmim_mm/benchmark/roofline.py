"""How long a device takes for counted operators at least: estimates from its data sheet."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Launch(NamedTuple):
    """One operator.

    Attributes:
        operator: Its name in ``torch.ops.aten``.
        part: Part of the network.
        flops: Floating-point operations, as ``torch.utils.flop_counter`` counts them.
        read: Bytes of its distinct inputs.
        written: Bytes of its distinct results.
    """

    operator: str
    part: str
    flops: int
    read: int
    written: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class Device:
    """What a data sheet says of a device.

    Attributes:
        name: Its name.
        peak: Floating-point operations a second of matrix products in bf16, dense.
        bandwidth: Bytes a second between it and its memory.
        launch: Seconds that an operator takes at least.
    """

    name: str
    peak: float
    bandwidth: float
    launch: float = 4e-6

    def seconds(self, launches: Iterable[Launch], scale: float) -> float:
        """Estimate: each operator is as slow as its arithmetic, its bytes, or its launch.

        Args:
            launches: The operators.
            scale: By what to multiply bytes; 0.5 for those of float32 where bf16 is meant.
        """
        return sum(
            max(x.flops / self.peak, x.moved * scale / self.bandwidth, self.launch)
            for x in launches
        )


DEVICES = (
    Device('H100', 989e12, 3.35e12),  # SXM
    Device('A100', 312e12, 2.04e12),  # SXM, 80 GB
    Device('RTX4090', 165e12, 1.01e12),
)


def device(
    name: str,
    peak: float | None = None,
    bandwidth: float | None = None,
    launch: float | None = None,
) -> Device:
    """A device by its name, in any spelling.

    Args:
        name: One of :data:`DEVICES`.
        peak: TFLOP/s in place of the data sheet's; None keeps it.
        bandwidth: TB/s in place of the data sheet's.
        launch: Microseconds that an operator takes at least.

    Raises:
        ValueError: If the name is unknown.
    """
    wanted = ''.join(filter(str.isalnum, name)).lower()
    for known in DEVICES:
        if known.name.lower() == wanted:
            return Device(
                known.name,
                known.peak if peak is None else peak * 1e12,
                known.bandwidth if bandwidth is None else bandwidth * 1e12,
                known.launch if launch is None else launch * 1e-6,
            )
    names = ', '.join(known.name for known in DEVICES)
    raise ValueError(f'--roofline: no device is named {name}; there are {names}')
