"""Converts a GreenMIM pre-training checkpoint: keeps the Swin, drops decoder and optimizer.

Example:
    python tools/convert_checkpoint.py work_dirs/greenmim/epoch_200.pth swin.pth --to mmdet
"""

import argparse
from collections.abc import Sequence

from greenmim_mm.checkpoint import FORMATS, convert_file

_TARGETS = ('mmdet', 'mmpretrain', 'greenmim_mm')


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog='formats: ' + '; '.join(f'{f.name}: {f.description}' for f in FORMATS.values()),
    )
    parser.add_argument('src', metavar='SRC', help="checkpoint of mmengine's runner, or authors'")
    parser.add_argument('dst', metavar='DST', help='file to write')
    parser.add_argument('--to', required=True, choices=_TARGETS, help='format to make')
    parser.add_argument(
        '--from',
        dest='source',
        default='auto',
        choices=('auto', *FORMATS),
        help='format of SRC (default: found out by the names)',
    )
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    args = parser.parse_args(argv)

    try:
        report = convert_file(args.src, args.dst, args.to, args.source, args.force)
    except (OSError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(report.summary())
    if licence := FORMATS[report.source].licence:
        print(f'licence: {licence}')
    print(f'wrote {args.dst}')


if __name__ == '__main__':
    main()
