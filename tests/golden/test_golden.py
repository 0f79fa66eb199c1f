"""Comparison with reference results in a file: ``make golden FILE=...``.

The file holds the parameters of a small pre-training model under the authors' names, an image, a
mask, and what the authors' program makes of them: latent, prediction, loss and gradient norms.

The authors' decoder puts the k-th visible feature at the place of the k-th unit that was kept in
the order of the random noise, while their encoder returns features row by row (see
docs/differences.md). The file records that order, and here it is applied before comparing.
"""

import numpy as np
import pytest
import torch

from greenmim_mm.checkpoint import convert_state_dict
from greenmim_mm.models import GreenMIM
from greenmim_mm.ops import BACKENDS, as_unit_mask, take_units


@pytest.fixture(scope='module')
def golden(request):
    with np.load(request.config.getoption('--golden')) as file:
        return dict(file)


@pytest.fixture(scope='module', params=BACKENDS)
def model(golden, request):
    parameters = {
        key.removeprefix('param/'): torch.from_numpy(value)
        for key, value in golden.items()
        if key.startswith('param/')
    }
    model = GreenMIM(
        backbone=dict(
            type='greenmim_mm.GreenSwin',
            arch=dict(embed_dims=16, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8)),
            window_size=int(golden['window']),
            drop_path_rate=0.0,
            norm_cfg=dict(type='LN', eps=1e-6),
        ),
        neck=dict(
            type='greenmim_mm.GreenMIMPretrainDecoder',
            embed_dim=128,
            decoder_embed_dim=64,
            decoder_num_heads=4,
        ),
        head=dict(
            type='MAEPretrainHead',
            norm_pix=True,
            patch_size=32,
            loss=dict(type='PixelReconstructionLoss', criterion='L2'),
        ),
    )
    converted = convert_state_dict(parameters, source='greenmim', target='greenmim_mm')
    model.load_state_dict(converted, strict=True)
    for module in model.backbone.modules():
        if hasattr(module, 'backend'):
            module.backend = request.param
    return model


def relative_error(result, expected):
    expected = torch.from_numpy(expected)
    return ((result.detach() - expected).norm() / expected.norm()).item()


def test_latent_prediction_loss_and_gradients(model, golden):
    images = torch.from_numpy(golden['image']).float()
    mask = as_unit_mask(golden['mask'], (7, 7))
    visible, hidden = mask.visible_units, mask.hidden_units
    latent = model.backbone(images, mask)
    assert relative_error(latent, golden['latent']) < 1e-5

    prediction = model.neck(latent[:, golden['restore'][0, visible]], mask)
    assert relative_error(prediction[..., ::8], golden['pred_visible_slice']) < 1e-5
    painted = prediction[:, hidden].reshape(len(hidden), 1, -1)
    target = take_units(images, hidden).flatten(0, 1)
    loss = model.head.loss(painted, target, painted.new_ones(len(hidden), 1))
    assert loss.item() == pytest.approx(float(golden['loss']), rel=1e-5)

    norms = {
        key.removeprefix('grad_norm/'): float(value)
        for key, value in golden.items()
        if key.startswith('grad_norm/')
    }
    assert len(norms) == 164
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()))
    # A gradient has the name and the channel order of its parameter.
    theirs = convert_state_dict(
        dict(zip(parameters, grads, strict=True)), source='greenmim_mm', target='greenmim'
    )
    for name, norm in norms.items():
        assert theirs[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-8), name
