"""Draws group window attention: the windows of a masked image, their groups, a group's mask.

The picture is computed by the package's own planning, not drawn by hand.

Example:
    python tools/analysis/draw_groups.py docs/images/group_window_attention.png --force
"""

from collections.abc import Sequence
from pathlib import Path

from greenmim_mm.cli.errors import Parser, errors_in_one_line

IMAGE_SIZE = 160
STAGE = 2  # of 0 to 3: a token is 16 pixels wide, a mask unit holds 2x2 of them
WINDOW = 5
MASK_RATIO = 0.6
IMAGE = 13  # of the demo's validation part
MASK_SEED = 34


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('path', type=Path, metavar='PNG', help='file to write')
    parser.add_argument('--force', action='store_true', help='replace a file that exists')
    args = parser.parse_args(argv)
    with errors_in_one_line(parser, OSError, ValueError):
        from greenmim_mm.demo.data import DemoDataConfig, draw_scene
        from greenmim_mm.demo.scenes import PHOTOGRAPHS, load_digit_pools, load_photographs
        from greenmim_mm.ops import mask_generator, random_mask
        from greenmim_mm.visualization import check_picture_path, draw_packing

        check_picture_path(args.path, args.force)
        photographs = {split: load_photographs(names) for split, names in PHOTOGRAPHS.items()}
        scene = DemoDataConfig(IMAGE_SIZE), 'val', IMAGE, load_digit_pools(), photographs
        mask = random_mask((IMAGE_SIZE // 32) ** 2, MASK_RATIO, mask_generator(MASK_SEED, 0, 0))
        draw_packing(draw_scene(*scene)[1], mask, args.path, STAGE, WINDOW, args.force)


if __name__ == '__main__':
    main()
