"""Builds the demo's data: handwritten digits in chalk or ink, with nothing downloaded.

Example:
    python tools/make_demo_data.py data/demo
"""

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from greenmim_mm.cli.errors import Parser, errors_in_one_line
from greenmim_mm.demo.data import DemoDataConfig, build_demo_data

_HELP = {
    'image_size': 'side of the images in pixels, a multiple of 32 and at least 96',
    'num_unlabelled': 'images for pre-training',
    'num_train': 'annotated training images',
    'num_val': 'annotated validation images',
    'num_dev': 'annotated images for choices, 0 for none',
    'seed': 'seed of the composition',
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('dst', metavar='DST', type=Path, help='folder to make')
    for field in fields(DemoDataConfig):
        parser.add_argument(
            f'--{field.name.replace("_", "-")}',
            type=int,
            default=field.default,
            help=f'{_HELP[field.name]} (default: {field.default})',
        )
    parser.add_argument('--overwrite', action='store_true', help='replace an earlier build in DST')
    args = parser.parse_args(argv)

    logging.basicConfig(level=logging.INFO, format='%(message)s')
    with errors_in_one_line(parser, ValueError, OSError, ImportError):
        config = DemoDataConfig(**{f.name: getattr(args, f.name) for f in fields(DemoDataConfig)})
        build_demo_data(args.dst, config, overwrite=args.overwrite)


if __name__ == '__main__':
    main()
