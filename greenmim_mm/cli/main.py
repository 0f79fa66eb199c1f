"""The command ``greenmim``: pre-training, weights and features from one line.

What a sub-command needs is imported when it is chosen: ``greenmim --help`` is quick.
"""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import EXIT_REFUSED

# Name: module beside this one, and what it does.
COMMANDS = {
    'pretrain': (
        'pretrain',
        'from your images to weights for mmdet, timm, transformers, detectron2',
    ),
    'export': ('export', 'weights of a checkpoint for those libraries, with code that loads them'),
    'convert': ('convert', 'a checkpoint of Swin from one library to another'),
    'inspect': ('inspecting', 'what a checkpoint is'),
    'reconstruct': ('reconstruct', 'pictures of what a pre-trained model paints'),
    'embed': ('embed', 'features of images as a file of numpy'),
    'knn': ('knn', 'how well features tell classes, by their nearest neighbours'),
    'benchmark': ('benchmark', 'speed and memory on this machine, against SimMIM and MAE'),
    'demo': ('demo', 'pre-training and detection on generated images, start to end'),
    'models': ('models', 'the networks that pretrain knows'),
    'train': ('train', 'train the model of a config, of this project or of OpenMMLab'),
    'test': ('test', 'evaluate a checkpoint with a config'),
}


def main(argv: Sequence[str] | None = None, prog: str = 'greenmim') -> None:
    """Run a sub-command; it ends the program where its exit code is not 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ['--version']:
        from ..version import __version__

        print(f'{prog} {__version__}')
        return
    if not argv or argv[0] in ('-h', '--help', 'help'):
        print(usage(prog))
        sys.exit(0 if argv else EXIT_REFUSED)
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(COMMANDS)}'
        print(f'{prog}: error: there is no command {name!r}; {hint}', file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    module = import_module(f'.{COMMANDS[name][0]}', __package__)
    if code := module.main(rest, f'{prog} {name}'):
        sys.exit(code)


def usage(prog: str) -> str:
    """What ``--help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {text}' for name, (_, text) in COMMANDS.items()]
    return '\n'.join(
        [
            f'usage: {prog} COMMAND ...',
            '',
            'GreenMIM: masked image modelling for Swin, from a folder of images to weights.',
            '',
            'commands:',
            *lines,
            '',
            f'{prog} COMMAND --help lists the options of a command; {prog} --version the version.',
            '',
            'example:',
            f'  {prog} pretrain photos/ --out runs/first',
        ]
    )
