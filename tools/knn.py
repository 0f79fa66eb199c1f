"""Classifies images by their nearest neighbours in the features of a checkpoint, as pre-trained.

Nothing is trained and no config is needed: the network follows from the checkpoint, which may be
of any format that tools/convert_checkpoint.py reads. Images lie in a folder for each class.

Example:
    python tools/knn.py work_dirs/greenmim/epoch_200.pth data/imagenet/train data/imagenet/val
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from greenmim_mm.cli.errors import Parser, errors_in_one_line


def parse_args(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='file of any known format')
    parser.add_argument('bank', metavar='LABELLED', help='folder of images to compare with')
    parser.add_argument('images', metavar='IMAGES', help='folder of images to classify and score')
    parser.add_argument('--k', type=int, default=20, help='neighbours that vote (default: 20)')
    parser.add_argument(
        '--temperature', type=float, default=0.07, help='of their votes (default: 0.07)'
    )
    parser.add_argument('--img-size', type=int, default=224, help='pixels (default: 224)')
    parser.add_argument('--resize', type=int, help='shorter side before (default: 8/7 of img-size)')
    parser.add_argument(
        '--window-size',
        type=int,
        nargs='+',
        help="windows, one or one for each stage (default: the checkpoint's)",
    )
    parser.add_argument('--batch-size', type=int, default=64, help='default: 64')
    parser.add_argument('--num-workers', type=int, default=2, help='processes that load images')
    parser.add_argument(
        '--from-scratch',
        action='store_true',
        help='the same network with weights as they are before training, to compare with',
    )
    return parser, parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Scores of the checkpoint that the command line names.

    Raises:
        OSError, ValueError: If a file is missing or does not fit.
    """
    from mmengine.runner import Runner

    from greenmim_mm.evaluation import backbone_config, feature_config, knn_config, own_checkpoint

    for folder in (args.bank, args.images):
        if not any(entry.is_dir() for entry in Path(folder).iterdir()):
            raise ValueError(f'{folder} has no folder for each class of its images')
    window_size = args.window_size
    if window_size is not None and len(window_size) == 1:
        window_size = window_size[0]
    with own_checkpoint(args.checkpoint) as path, tempfile.TemporaryDirectory() as logs:
        backbone = backbone_config(path, window_size)
        features = feature_config(
            None if args.from_scratch else path, backbone, args.img_size, args.resize
        )
        runner = Runner.from_cfg(
            knn_config(
                features,
                args.bank,
                args.images,
                logs,
                args.k,
                args.temperature,
                args.batch_size,
                args.num_workers,
            )
        )
        runner.model.init_weights()
        return runner.test()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser, args = parse_args(argv)
    with errors_in_one_line(parser, OSError, ValueError):
        scores = evaluate(args)
    print('\n'.join(f'{name}: {value:.2f} %' for name, value in scores.items()))


if __name__ == '__main__':
    main()
