"""Draws how large activations grow over depth in GreenSwin and in GreenSwinV2.

Example:
    python tools/make_demo_data.py work_dirs/activations/data --image-size 160
    python tools/activations.py work_dirs/activations/data/unlabelled --out activations.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from greenmim_mm.visualization.activations import (
    ActivationSettings,
    check_outputs,
    compare_activations,
    draw_report,
    save_report,
)
from greenmim_mm.visualization.reconstruction import check_picture_path

_DEFAULTS = ActivationSettings()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('images', metavar='FOLDER', help='images to pre-train and to measure on')
    parser.add_argument('--out', metavar='OUT.png', required=True, help='file to write; .json too')
    for name in ('steps', 'batch_size', 'num_probe', 'image_size', 'window_size', 'embed_dims'):
        option = f'--{name.replace("_", "-")}'
        parser.add_argument(option, type=int, metavar='N', default=getattr(_DEFAULTS, name))
    for name in ('depths', 'num_heads'):
        option = f'--{name.replace("_", "-")}'
        default = getattr(_DEFAULTS, name)
        parser.add_argument(option, type=int, nargs=4, metavar='N', default=default)
    parser.add_argument('--lr', type=float, default=_DEFAULTS.lr, help='learning rate of AdamW')
    parser.add_argument('--seed', type=int, default=_DEFAULTS.seed)
    parser.add_argument('--force', action='store_true', help='replace files that exist')
    args = parser.parse_args(argv)

    try:
        options = vars(args)
        picture, force, folder = (options.pop(name) for name in ('out', 'force', 'images'))
        settings = ActivationSettings(
            **options | dict(depths=tuple(args.depths), num_heads=tuple(args.num_heads))
        )
        check_picture_path(picture, force)
        numbers = Path(picture).with_suffix('.json')
        check_outputs([numbers], force)
        report = compare_activations(folder, settings, lambda line: print(line, flush=True))
        draw_report(report, picture, force)
        save_report(report, numbers, force)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(f'wrote {picture} and {numbers}')


if __name__ == '__main__':
    main()
