"""torch.compile: blocks in one graph, one compilation for all masks, the same results."""

from collections import Counter

import numpy as np
import pytest
import torch
from mmpretrain.registry import MODELS
from torch._dynamo.testing import CompileCounter

import greenmim_mm.models  # noqa: F401 - registers GreenMIM
from greenmim_mm.compat import compiles_plans
from greenmim_mm.ops import random_mask

MINI = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))


class Graphs(CompileCounter):
    """Runs what is compiled as it is; remembers how often something was, and its functions."""

    def __init__(self):
        super().__init__()
        self.functions = Counter()

    def __call__(self, graph, inputs):
        self.functions.update(getattr(node.target, '__name__', '') for node in graph.graph.nodes)
        return super().__call__(graph, inputs)


@pytest.mark.skipif(not compiles_plans(), reason='TorchDynamo of torch 2.1 fails on plans')
def test_compile():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='greenmim_mm.GreenMIM',
            backbone=dict(
                type='greenmim_mm.GreenSwin', arch=MINI, window_size=7, drop_path_rate=0.0
            ),
            neck=dict(
                type='greenmim_mm.GreenMIMPretrainDecoder',
                embed_dim=128,
                decoder_embed_dim=32,
                decoder_num_heads=4,
            ),
            head=dict(
                type='mmpretrain.MAEPretrainHead',
                norm_pix=True,
                patch_size=32,
                loss=dict(type='mmpretrain.PixelReconstructionLoss', criterion='L2'),
            ),
        )
    )
    model.init_weights()
    counter = Graphs()
    compiled = torch.compile(model.masked_loss, backend=counter)
    rng = np.random.default_rng(0)
    images = torch.randn(2, 3, 224, 224)
    parameters = [p for p in model.parameters() if p.requires_grad]
    frames = []
    for _ in range(10):
        mask = random_mask(49, 0.75, rng)
        expected, loss = model.masked_loss(images, mask), compiled(images, mask)
        frames.append(counter.frame_count)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(loss, parameters)
        wanted = torch.autograd.grad(expected, parameters)
        torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-5)
    # The backbone is one graph behind the planning, the decoder another, the loss the third; no
    # later mask compiles anything again.
    assert set(frames) == {3}
    # The compiler chooses the kernel of attention, in eight blocks and in that of the decoder.
    assert counter.functions['scaled_dot_product_attention'] == 9
