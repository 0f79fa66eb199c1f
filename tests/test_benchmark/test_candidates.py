"""Candidates do the work of the methods that they stand for."""

import numpy as np
import pytest
import torch

from greenmim_mm.benchmark import candidates
from greenmim_mm.benchmark.candidates import (
    CANDIDATES,
    Candidate,
    GreenMIMStep,
    mae,
    missing,
    select,
    simmim,
)
from greenmim_mm.benchmark.measure import kept_bytes
from greenmim_mm.compat import is_upstream
from greenmim_mm.models import GreenMIM, GreenSwinV2
from greenmim_mm.ops import UnitMask, random_mask

MINI = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
MINI_VIT = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)


MINI_V2 = dict(MINI, extra_norm_every_n_blocks=0)


def candidate(build=GreenMIMStep, arch=MINI, **kwargs):
    return Candidate('name', 'group', 'label', build, arch, **kwargs)


def test_our_step_is_the_algorithm():
    """The same loss, gradients and bytes as GreenMIM of mmpretrain with the same weights."""
    torch.manual_seed(0)
    step = GreenMIMStep(candidate()).double()
    algorithm = GreenMIM(
        backbone=dict(type='greenmim_mm.GreenSwin', arch=MINI, window_size=7, drop_path_rate=0.0),
        neck=dict(type='greenmim_mm.GreenMIMPretrainDecoder', embed_dim=128),
        head=dict(
            type='MAEPretrainHead',
            norm_pix=True,
            patch_size=32,
            loss=dict(type='PixelReconstructionLoss', criterion='L2'),
        ),
    ).double()
    algorithm.load_state_dict(step.state_dict())
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    mask = UnitMask((7, 7), random_mask(49, 0.75, np.random.default_rng(0)))

    loss, expected = step.masked_loss(images, mask), algorithm.masked_loss(images, mask)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    other = dict(algorithm.named_parameters())
    for name, parameter in step.named_parameters():
        torch.testing.assert_close(parameter.grad, other[name].grad, msg=name)

    ours = kept_bytes(lambda: step.masked_loss(images, mask), step)
    theirs = kept_bytes(lambda: algorithm.masked_loss(images, mask), algorithm)
    # The loss of upstream's mmpretrain keeps a little more.
    assert ours == pytest.approx(theirs, rel=0.1 if is_upstream() else 0.01)


def test_masks_are_drawn_anew_at_every_step():
    step = GreenMIMStep(candidate())
    images = torch.rand(1, 3, 224, 224)
    masks = np.stack([step.mask(images).hidden for _ in range(5)])
    assert (~masks).sum(axis=1).tolist() == [12] * 5
    assert len(np.unique(masks, axis=0)) == 5


@pytest.mark.parametrize(('img_size', 'window_size'), [(192, 6), (192, 12), (224, 7), (224, 14)])
def test_simmim_runs_at_every_size_of_the_table(img_size, window_size):
    model = simmim(candidate(simmim, img_size=img_size, window_size=window_size))
    images = torch.rand(2, 3, img_size, img_size)
    samples = model.draw(images)
    units = (img_size // 32) ** 2
    for sample in samples:
        assert sample.mask.shape == (img_size // 4, img_size // 4)
        units_hidden = sample.mask.unfold(0, 8, 8).unfold(1, 8, 8).float().mean((-1, -2))
        assert set(units_hidden.flatten().tolist()) == {0.0, 1.0}
        assert units_hidden.sum() == np.ceil(0.6 * units)
    assert not torch.equal(samples[0].mask, samples[1].mask)
    loss = model(images, samples)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(('img_size', 'window_size'), [(192, 6), (192, 12), (256, 8)])
def test_swin_v2_runs_at_every_size_of_the_table(img_size, window_size):
    """The same network in both methods."""
    settings = dict(arch=MINI_V2, img_size=img_size, window_size=window_size, version=2)
    ours, peer = GreenMIMStep(candidate(**settings)), simmim(candidate(simmim, **settings))
    assert type(ours.backbone) is GreenSwinV2
    networks = [
        {name: p.shape for name, p in backbone.named_parameters() if name != 'mask_token'}
        for backbone in (ours.backbone, peer.model.backbone)
    ]
    assert networks[0] == networks[1]
    images = torch.rand(2, 3, img_size, img_size)
    for model in (ours, peer):
        loss = model(images, model.draw(images))
        loss.backward()
        assert loss.isfinite()


def test_mae_runs():
    model = mae(candidate(mae, MINI_VIT))
    images = torch.rand(2, 3, 224, 224)
    assert model.draw(images) is None
    assert model(images, None).isfinite()


def test_the_table_has_what_the_papers_train():
    table = {c.name: (c.group, c.arch, c.img_size, c.window_size, c.batch) for c in CANDIDATES}
    assert table['greenmim-base'] == ('Swin-B', 'base', 224, 7, 8)
    assert table['simmim-base-192'] == ('Swin-B', 'base', 192, 6, 8)
    assert table['simmim-base-224'] == ('Swin-B', 'base', 224, 7, 8)
    assert table['greenmim-large'] == ('Swin-L', 'large', 224, 14, 4)
    assert table['simmim-large-192'] == ('Swin-L', 'large', 192, 12, 4)
    assert table['mae-base'][:1] == ('Swin-B',)
    assert table['greenmim-v2base-256'] == ('Swin V2-B, 256 px', 'base', 256, 8, 8)
    assert table['simmim-v2base-192'] == ('Swin V2-B, 192 px', 'base', 192, 6, 8)
    groups = [c.group for c in CANDIDATES]
    names = list(dict.fromkeys(groups))
    assert names[:3] == ['Swin-T', 'Swin-B', 'Swin-L']
    assert names[3:] == ['Swin V2-B, 192 px', 'Swin V2-B, 256 px', 'Swin V2-L, 192 px']
    assert groups == sorted(groups, key=names.index)
    assert not any(c.needs for c in CANDIDATES if c.build is GreenMIMStep)


@pytest.mark.parametrize(
    ('name', 'millions'),
    [
        ('greenmim-tiny', 32.6),
        ('simmim-tiny-192', 29.9),
        ('greenmim-base', 92.0),
        ('simmim-base-224', 89.9),
        ('mae-base', 111.7),
        ('greenmim-v2base-256', 92.1),
        ('simmim-v2base-256', 90.0),
    ],
)
def test_models_of_the_table_have_their_papers_size(name, millions):
    """Backbone, decoder and prediction together, what is trained."""
    (found,) = select([name])
    trained = [p.numel() for p in found.build(found).parameters() if p.requires_grad]
    assert sum(trained) / 1e6 == pytest.approx(millions, abs=0.05)


def test_select_takes_names_and_patterns_in_the_order_of_the_table():
    assert [c.name for c in select(['mae-base', '*-tiny*'])] == [
        'greenmim-tiny',
        'greenmim-tiny-mlp',
        'greenmim-tiny-keep',
        'simmim-tiny-192',
        'simmim-tiny-224',
        'mae-base',
    ]
    assert select(None) == CANDIDATES
    with pytest.raises(ValueError, match='no model is named swin; there are greenmim-tiny'):
        select(['mae-base', 'swin'])


def test_missing_packages_are_named(monkeypatch):
    assert missing(()) == ''
    assert missing(('torch',)) == ''
    assert missing(('torch', 'no_such_package')) == 'skipped: no_such_package is not installed'

    def fail(name):
        raise AssertionError('MMCV==1.0 is used but incompatible.\nInstall another.')

    monkeypatch.setattr(candidates, 'import_module', fail)
    assert missing(('torch',)) == (
        'skipped: torch cannot be imported (MMCV==1.0 is used but incompatible.)'
    )
