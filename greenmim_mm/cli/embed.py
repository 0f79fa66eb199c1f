"""Writes features of images as a file of numpy, from a checkpoint of any format.

Example:
    greenmim embed photos/ --checkpoint runs/first --out features.npz
"""

from collections.abc import Sequence

from .errors import Parser, ended_by_signals, errors_in_one_line
from .options import positive


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command; bad input ends it with exit code 2 and one line on stderr."""
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('data', metavar='DATA', nargs='+', help='folders, images, and lists of them (.txt)')
    add('--checkpoint', metavar='C', required=True, help='file, or folder of a run')
    add('--out', metavar='FILE.npz', required=True, help='gets `features` and `paths`')
    add('--image-size', type=positive, metavar='N', help='pixels (default: by the windows)')
    add('--window', type=positive, metavar='N', help="default: the checkpoint's")
    add('--batch-size', type=positive, metavar='N', default=64, help='default: 64')
    add('--workers', type=int, metavar='N', default=2, help='processes that load images')
    add('--device', choices=('cpu', 'cuda'), help='default: a GPU if there is one')
    add('--max-bad', metavar='N|P%', default='1%', help='unreadable images (default: 1%%)')
    add('--force', action='store_true', help='replace FILE.npz if it exists')
    args = parser.parse_args(argv)
    with errors_in_one_line(parser, OSError, ValueError, ImportError), ended_by_signals():
        from .embedding import embed
        from .screen import Screen

        screen = Screen()
        features = embed(
            args.data,
            args.checkpoint,
            args.out,
            max_bad=args.max_bad,
            force=args.force,
            image_size=args.image_size,
            window_size=args.window,
            batch_size=args.batch_size,
            workers=args.workers,
            device=args.device,
            progress=lambda done: screen.terminal and screen.status(f'{done:,} images'),
        )
        for path, reason in features.bad.items():
            screen.say(f'passed over: {path} ({reason})')
        count, width = features.values.shape
        screen.say(f'wrote {args.out}: {count:,} images, {width} features each')
