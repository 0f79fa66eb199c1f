"""torch.compile: blocks in one graph, few compilations over many masks, the same results."""

import numpy as np
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import mse_loss

from greenmim_mm.models import GreenSwin
from greenmim_mm.ops import random_mask

MINI = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))


def test_compile():
    torch._dynamo.reset()
    model = GreenSwin(MINI, window_size=7, drop_path_rate=0.0)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    rng = np.random.default_rng(0)
    images = torch.randn(2, 3, 224, 224)
    for _ in range(10):
        mask = random_mask(49, 0.75, rng)
        expected = model(images, mask)
        out = compiled(images, mask)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        parameters = list(model.parameters())
        grads = torch.autograd.grad(mse_loss(out, images.new_ones(out.shape)), parameters)
        wanted = torch.autograd.grad(mse_loss(expected, images.new_ones(out.shape)), parameters)
        torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-5)
    # All stages are one graph behind the planning; sizes that change become dynamic.
    assert 1 <= counter.frame_count <= 5
