"""What tests of tracing need."""

import pytest
import torch

from greenmim_mm.compat import compiles_plans


@pytest.fixture(scope='module')
def dynamo():
    """Skip where TorchDynamo does not take a class of ours, as in torch 2.1."""
    if not compiles_plans():
        pytest.skip('TorchDynamo of torch 2.1 traces no classes, and no plans')
    torch._dynamo.reset()
