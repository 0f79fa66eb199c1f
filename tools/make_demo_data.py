"""Builds the demo's data: handwritten digits over calm backgrounds, with nothing downloaded.

Example:
    python tools/make_demo_data.py data/demo
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from greenmim_mm.demo.data import DemoDataConfig, build_demo_data

_HELP = {
    'image_size': 'side of the images in pixels, a multiple of 32 and at least 96',
    'num_unlabelled': 'images for pre-training',
    'num_train': 'annotated training images',
    'num_val': 'annotated validation images',
    'num_dev': 'annotated images for choices, 0 for none',
    'seed': 'seed of the composition',
}


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; ``--help`` has the rest."""

    def error(self, message: str) -> None:
        self.exit(2, f'{self.prog}: error: {message}\n')


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser = _Parser(description=__doc__.splitlines()[0])
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
    try:
        config = DemoDataConfig(**{f.name: getattr(args, f.name) for f in fields(DemoDataConfig)})
    except ValueError as error:
        parser.error(str(error))
    try:
        build_demo_data(args.dst, config, overwrite=args.overwrite)
    except (OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
