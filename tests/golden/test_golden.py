"""Comparison with reference results in a file: ``make golden FILE=...``.

The file holds the parameters of a small pre-training model under the authors' names, an image, a
mask, and what the authors' program makes of them: latent, prediction, loss and gradient norms.

The prediction depends on where the decoder puts the visible features. Here a feature gets the
position embedding of its own unit. The reference program may hand them over in another order
(that of its groups): the order is found by comparing predictions, and with it all else must agree.
"""

import numpy as np
import pytest
import torch

from greenmim_mm.checkpoint import FORMATS, convert_state_dict
from greenmim_mm.models import GreenMIM
from greenmim_mm.models.greenmim import hidden_units
from greenmim_mm.ops import BACKENDS


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


@pytest.fixture(scope='module')
def latent(model, golden):
    images = torch.from_numpy(golden['image']).float()
    return model.backbone(images, torch.from_numpy(golden['mask']))


def test_latent(latent, golden):
    assert relative_error(latent, golden['latent']) < 1e-4


def test_prediction_loss_and_gradients(model, latent, golden):
    images, mask = torch.from_numpy(golden['image']).float(), golden['mask'][0]
    visible = np.flatnonzero(~mask)
    expected = golden['pred_visible_slice']

    ours = model.neck(latent, mask, (7, 7))[0, visible, ::8]
    nearest = torch.cdist(ours, torch.from_numpy(expected[0, visible])).argmin(1).numpy()
    assert sorted(nearest) == list(range(len(visible))), 'no order of the features agrees'
    order = np.argsort(nearest)

    prediction = model.neck(latent[:, order], mask, (7, 7))
    assert relative_error(prediction[..., ::8], expected) < 1e-4
    hidden = prediction[:, np.flatnonzero(mask)].reshape(-1, 1, prediction.shape[2])
    loss = model.head.loss(hidden, hidden_units(images, mask), hidden.new_ones(len(hidden), 1))
    assert abs(loss.item() / golden['loss'] - 1) < 1e-4
    # The features' own places change the loss of this random network very little.
    assert abs(model.masked_loss(images, mask).item() / golden['loss'] - 1) < 1e-4

    parameters = dict(model.named_parameters())
    norms = {key: value for key, value in golden.items() if key.startswith('grad_norm/')}
    names = [
        FORMATS['greenmim_mm'].from_canonical(
            FORMATS['greenmim'].to_canonical(key.removeprefix('grad_norm/'))
        )
        for key in norms
    ]
    grads = torch.autograd.grad(loss, [parameters[name] for name in names], retain_graph=True)
    assert len(norms) > 100
    for name, grad, norm in zip(names, grads, norms.values(), strict=True):
        assert grad.norm().item() == pytest.approx(float(norm), rel=1e-3), name
