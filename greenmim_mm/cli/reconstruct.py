"""Draws original, masked and painted-back images of a GreenMIM pre-training as one PNG.

Example:
    greenmim reconstruct runs/first/config.py runs/first photos/ --out painted.png
"""

from collections.abc import Sequence

from .errors import Parser, errors_in_one_line


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command; bad input ends it with exit code 2 and one line on stderr."""
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument('config', metavar='CONFIG', help='config of the pre-training')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint or folder of its run')
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='image file, or folder of them')
    parser.add_argument('--out', metavar='OUT.png', required=True, help='file to write')
    parser.add_argument('--mask-ratio', type=float, default=0.75, help='default: 0.75')
    parser.add_argument('--seed', type=int, default=0, help='seed of the masks (default: 0)')
    parser.add_argument(
        '--size',
        type=int,
        help="side in pixels, a multiple of 32 (default: the backbone's img_size)",
    )
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--force', action='store_true', help='replace OUT.png if it exists')
    args = parser.parse_args(argv)

    with errors_in_one_line(parser, OSError, ValueError):
        from .. import visualization as pictures
        from ..ops import check_mask_ratio, unit_grid
        from .exporting import find_checkpoint

        # What is cheap to check comes before the model is built.
        pictures.check_picture_path(args.out, args.force)
        check_mask_ratio(args.mask_ratio)
        if args.size is not None:
            unit_grid(args.size, args.size)
        paths = pictures.find_images(args.images)
        model = pictures.load_model(args.config, find_checkpoint(args.checkpoint), args.device)
        panels = pictures.reconstruct_files(model, paths, args.size, args.mask_ratio, args.seed)
        titles = pictures.panel_titles(args.mask_ratio, model.head.norm_pix)
        pictures.save_reconstructions(args.out, panels, titles, args.force)
    print(f'wrote {args.out}: {len(paths)} images')
