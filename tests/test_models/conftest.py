"""What tests of tracing need."""

from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Made:
    """Something that a function makes while it is traced, as a network makes its plans."""

    value: float


@pytest.fixture(scope='module')
def dynamo():
    """Skip where TorchDynamo does not take a class of ours, as in torch 2.1."""
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: x + Made(1.0).value, fullgraph=True, backend='eager')(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        pytest.skip('TorchDynamo of this torch traces no classes, and no plans')
