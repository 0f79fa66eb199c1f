"""Writes the weights of a checkpoint for mmdet, timm, transformers and detectron2.

Example:
    greenmim export runs/first --out weights/
"""

from collections.abc import Sequence

from .errors import Parser, ended_by_signals, errors_in_one_line
from .options import positive
from .pretraining.plan import EXPORTS


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command; bad input ends it with exit code 2 and one line on stderr."""
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT', help='file of any format, or folder of a run')
    add('--out', metavar='DIR', required=True, help='folder to make')
    add(
        '--formats',
        type=lambda text: tuple(filter(None, text.split(','))),
        default=EXPORTS,
        metavar='NAME,...',
        help=f'default: {",".join(EXPORTS)}',
    )
    add('--window', type=positive, metavar='N', help='resize to these (default: as they are)')
    add('--verify', action='store_true', help='load each into its library and compare features')
    add('--force', action='store_true', help='replace earlier exports in DIR')
    args = parser.parse_args(argv)
    with errors_in_one_line(parser, OSError, ValueError, ImportError), ended_by_signals():
        from .exporting import export, tell
        from .screen import Screen

        screen = Screen()
        exports = export(
            args.checkpoint,
            args.out,
            args.formats,
            window_size=args.window,
            verify=args.verify,
            force=args.force,
            say=screen.say,
        )
        tell(exports, screen)
