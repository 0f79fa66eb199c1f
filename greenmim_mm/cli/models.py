"""Lists the networks that ``greenmim pretrain`` knows."""

from collections.abc import Sequence

from .errors import Parser
from .pretraining.plan import MODELS, model_defaults


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print the table."""
    parser = Parser(prog=prog, description=__doc__)
    parser.parse_args(argv)
    from ..archs import SWIN_ARCHS, SWINV2_ARCHS

    rows = [('model', 'channels', 'blocks', 'heads', 'pixels', 'window', 'batch of a GPU')]
    for name, (version, size) in MODELS.items():
        arch = (SWIN_ARCHS if version == 1 else SWINV2_ARCHS)[size]
        pixels, window, batch = model_defaults(name)
        sizes = (arch['embed_dims'], _joined(arch['depths']), _joined(arch['num_heads']))
        rows.append(tuple(map(str, (name, *sizes, pixels, window, batch))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print('  '.join(f'{cell:{w}}' for cell, w in zip(row, widths, strict=True)).rstrip())


def _joined(values: Sequence[int]) -> str:
    return ', '.join(map(str, values))
