"""Classifies images by their nearest neighbours in the features of a checkpoint, as pre-trained.

Nothing is trained and no config is needed: the network follows from the checkpoint, which may be
of any format that ``greenmim inspect`` knows. Images lie in a folder for each class. With one
folder each image is classified by all others.

Examples:
    greenmim knn runs/first labelled/
    greenmim knn work_dirs/greenmim/epoch_200.pth data/imagenet/train data/imagenet/val
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .errors import Parser, UserError, errors_in_one_line


def parse_args(
    argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line."""
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT', help='file of any known format, or folder of a run'
    )
    parser.add_argument('bank', metavar='LABELLED', help='folder of images to compare with')
    parser.add_argument(
        'images',
        metavar='IMAGES',
        nargs='?',
        help='folder of images to classify and score (default: each of LABELLED by the others)',
    )
    parser.add_argument('--k', type=int, default=20, help='neighbours that vote (default: 20)')
    parser.add_argument(
        '--temperature', type=float, default=0.07, help='of their votes (default: 0.07)'
    )
    parser.add_argument(
        '--img-size', '--image-size', type=int, help='pixels (default: by the windows)'
    )
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

    from ..evaluation import (
        backbone_config,
        feature_config,
        knn_config,
        own_checkpoint,
        usual_image_size,
    )
    from .exporting import find_checkpoint

    if args.window_size is not None and len(args.window_size) == 1:
        args.window_size = args.window_size[0]
    args.checkpoint = find_checkpoint(args.checkpoint)
    if args.img_size is None:
        args.img_size = usual_image_size(args.checkpoint, args.window_size)
    if args.images is None:
        return _leave_one_out(args)
    for folder in (args.bank, args.images):
        if not any(entry.is_dir() for entry in Path(folder).iterdir()):
            raise ValueError(f'{folder} has no folder for each class of its images')
    window_size = args.window_size
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


def _leave_one_out(args: argparse.Namespace) -> dict[str, float]:
    """Each labelled image is classified by all others."""
    import torch

    from ..evaluation import knn_scores
    from .embedding import labelled_features

    if args.from_scratch:
        raise UserError('--from-scratch needs IMAGES as well')
    features, labels, classes = labelled_features(
        args.bank,
        args.checkpoint,
        image_size=args.img_size,
        resize=args.resize,
        window_size=args.window_size,
        batch_size=args.batch_size,
        workers=args.num_workers,
    )
    values, labels = torch.from_numpy(features.values), torch.from_numpy(labels)
    scores = knn_scores(
        values, values, labels, len(classes), args.k, args.temperature, leave_one_out=True
    )
    return {'accuracy/top1': 100 * float((scores.argmax(1) == labels).float().mean())}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command; bad input ends it with exit code 2 and one line on stderr."""
    parser, args = parse_args(argv, prog)
    with errors_in_one_line(parser, OSError, ValueError):
        scores = evaluate(args)
    print('\n'.join(f'{name}: {value:.2f} %' for name, value in scores.items()))
