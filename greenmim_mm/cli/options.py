"""The options that training and testing share."""

import argparse
from collections.abc import Sequence
from typing import Any

from .errors import Parser


class Pairs(argparse.Action):
    """``KEY=VALUE`` pairs as they are, of all uses of the option."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        """Add pairs to those of the option's earlier uses."""
        if bare := [value for value in values if '=' not in value]:
            parser.error(f'{option_string} {bare[0]!r}: give KEY=VALUE')
        setattr(namespace, self.dest, self.joined(getattr(namespace, self.dest, None), values))

    def joined(self, earlier: Any, values: Sequence[str]) -> Any:
        """What the option holds after one more use."""
        return (*(earlier or ()), *values)


class ConfigOptions(Pairs):
    """The dict that mmengine's ``DictAction`` makes of such pairs.

    It is imported when the option is used: ``--help`` needs no torch.
    """

    def joined(self, earlier: dict[str, Any] | None, values: Sequence[str]) -> dict[str, Any]:
        """What the option holds after one more use."""
        from mmengine.config import DictAction

        found = argparse.Namespace()
        DictAction(self.option_strings, self.dest)(None, found, values)
        return {**(earlier or {}), **getattr(found, self.dest)}


def positive(text: str) -> int:
    """A positive whole number, for ``type=``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive whole number')
    return int(text)


def run_parser(prog: str | None, description: str) -> Parser:
    """Parser of a command that runs a config."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument(
        'config', metavar='CONFIG', help="config file, or 'mmdet::...' / 'mmpretrain::...'"
    )
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints (default: work_dirs/<config name>)'
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        metavar='KEY=VALUE',
        help='settings to change in the config, e.g. train_dataloader.batch_size=64',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    # Older launchers of PyTorch pass it, newer ones set LOCAL_RANK.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser
