"""The command as tests call it, with a network of a few numbers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from greenmim_mm.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    '--cfg-options',
    *(f'model.backbone.arch.{name}' for name in ('embed_dims=16', 'depths=[1,1,1,2]')),
    'model.backbone.arch.num_heads=[1,2,4,8]',
    *('model.neck.embed_dim=128', 'model.neck.decoder_embed_dim=32'),
    'model.neck.decoder_num_heads=2',
]
OPTIONS = ['--image-size', '64', '--batch-size', '4', '--workers', '0', *SMALL]


def command(*arguments: object) -> None:
    """``greenmim ...`` in this process."""
    main([str(argument) for argument in arguments])


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    """``greenmim ...`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, '-m', 'greenmim_mm', *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT)) | environment,
    )


def weights(run: Path, name: str) -> dict:
    return torch.load(run / 'checkpoints' / name, weights_only=False)['state_dict']


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[key], second[key]) for key in first
    )
