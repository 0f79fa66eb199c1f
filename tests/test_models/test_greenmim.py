"""GreenMIM: the loss, its masks, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from greenmim_mm.models import GreenMIM, GreenMIMPretrainDecoder
from greenmim_mm.models.decoder import sincos_position_embedding
from greenmim_mm.ops import random_mask

CONFIG = dict(
    backbone=dict(
        type='greenmim_mm.GreenSwin',
        arch=dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
        window_size=4,
        drop_path_rate=0.0,
    ),
    neck=dict(
        type='greenmim_mm.GreenMIMPretrainDecoder',
        embed_dim=128,
        decoder_embed_dim=32,
        decoder_num_heads=4,
    ),
    head=dict(
        type='MAEPretrainHead',
        norm_pix=True,
        patch_size=32,
        loss=dict(type='PixelReconstructionLoss', criterion='L2'),
    ),
)


@pytest.fixture
def hub():
    """A fresh message hub: another test's runner must not decide about masks here."""
    return MessageHub.get_instance(f'hub-{np.random.default_rng().integers(2**62)}')


@pytest.fixture
def model(hub):
    torch.manual_seed(0)
    model = GreenMIM(**CONFIG)
    model.init_weights()
    return model.eval()


def slow_loss(model, images, mask):
    """Mean over images and hidden units of the squared error of normalised pixels."""
    prediction = model.reconstruct(images, mask)
    columns = images.shape[-1] // 32
    errors = []
    for image, painted in zip(images, prediction, strict=True):
        for unit in np.flatnonzero(mask):
            row, column = 32 * (unit // columns), 32 * (unit % columns)
            target = image[:, row : row + 32, column : column + 32].permute(1, 2, 0).flatten()
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((painted[unit] - target).square().mean())
    return torch.stack(errors).mean()


@pytest.mark.parametrize('size', [(128, 128), (96, 160), (32, 64)])
def test_loss(model, size):
    images = torch.rand(3, 3, *size)
    mask = random_mask(size[0] * size[1] // 1024, 0.7, np.random.default_rng(0))
    torch.testing.assert_close(model.masked_loss(images, mask), slow_loss(model, images, mask))


def test_loss_is_that_of_the_head_on_whole_square_images(model):
    """The head gets hidden units one by one; on whole images it would say the same."""
    images = torch.rand(2, 3, 128, 128)
    mask = random_mask(16, 0.75, np.random.default_rng(0))
    whole = model.head.loss(
        model.reconstruct(images, mask), images, torch.from_numpy(mask).float().expand(2, -1)
    )
    torch.testing.assert_close(model.masked_loss(images, mask), whole)


def test_every_parameter_gets_a_gradient(model):
    """Otherwise distributed training would stop."""
    model.train()(torch.rand(2, 3, 96, 96), mode='loss')['loss'].backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_tensor_mode_and_extract_feat_are_dense(model):
    images = torch.rand(1, 3, 64, 96)
    dense = model.backbone(images)
    assert isinstance(dense, tuple) and dense[0].shape == (1, 128, 2, 3)
    assert torch.equal(model(images)[0], dense[0])
    assert torch.equal(model.extract_feat(images)[0], dense[0])


def test_masks_follow_seed_and_iteration(model, hub):
    hub.update_info_dict(dict(seed=5, iter=3))
    other = copy.deepcopy(model)
    first, second = model.draw_mask((7, 7)), model.draw_mask((7, 7))
    assert (first.hidden != second.hidden).any()  # two passes of one iteration
    assert len(first.visible_units) == 12
    np.testing.assert_array_equal(other.draw_mask((7, 7)).hidden, first.hidden)  # as after a resume
    hub.update_info('iter', 4)
    fourth = model.draw_mask((7, 7))
    assert (fourth.hidden != first.hidden).any()
    np.testing.assert_array_equal(other.draw_mask((7, 7)).hidden, fourth.hidden)
    hub.update_info('seed', 6)
    assert (other.draw_mask((7, 7)).hidden != fourth.hidden).any()


def test_masks_differ_between_ranks(model, hub, monkeypatch):
    hub.update_info_dict(dict(seed=5, iter=3))
    first = copy.deepcopy(model).draw_mask((7, 7))
    monkeypatch.setattr('greenmim_mm.models.greenmim.get_rank', lambda: 1)
    assert (model.draw_mask((7, 7)).hidden != first.hidden).any()


def test_masks_move_on_without_a_runner(model):
    masks = {model.draw_mask((7, 7)).hidden.tobytes() for _ in range(20)}
    assert len(masks) == 20


def test_amp(model):
    """bfloat16 autocast: finite, and near the loss in float32."""
    images = torch.rand(2, 3, 128, 128)
    mask = random_mask(16, 0.75, np.random.default_rng(0))
    exact = model.masked_loss(images, mask)
    with torch.autocast('cpu', torch.bfloat16):
        loss = model.masked_loss(images, mask)
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_learns(model):
    """A few steps on one batch bring the loss down."""
    images = nn.functional.interpolate(torch.rand(4, 3, 8, 8), size=96, mode='bilinear')
    mask = random_mask(9, 0.5, np.random.default_rng(0))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        loss = model.train().masked_loss(images, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize('ratio', [0, 1, 1.2, -1])
def test_refuses_mask_ratio(ratio):
    with pytest.raises(ValueError, match='mask_ratio=.*between 0 and 1'):
        GreenMIM(**CONFIG, mask_ratio=ratio)


def test_refuses_other_patch_size():
    config = copy.deepcopy(CONFIG)
    config['head']['patch_size'] = 16
    with pytest.raises(ValueError, match='head.patch_size=16'):
        GreenMIM(**config)


def test_refuses_image_size(model):
    with pytest.raises(ValueError, match='100x96.*multiples of 32'):
        model.loss(torch.rand(1, 3, 100, 96))


def test_is_built_by_scope():
    from mmengine.registry import MODELS

    assert type(MODELS.build(dict(type='greenmim_mm.GreenMIM', **CONFIG))) is GreenMIM


def test_positions():
    """The first half tells the column, the second the row."""
    table = torch.from_numpy(sincos_position_embedding((3, 5), 16)).view(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    assert table.flatten(0, 1).unique(dim=0).shape[0] == 15
    torch.testing.assert_close(table[0, 2, 0], torch.tensor(2.0).sin())


def test_positions_of_other_wavelengths():
    """Four places are one turn of the first channel; the next ones get longer towards 40."""
    table = torch.from_numpy(sincos_position_embedding((2, 5), 16, (4, 40))).view(2, 5, 16)
    for channel, wavelength in enumerate((4, 4 * 10**0.25, 4 * 10**0.5, 4 * 10**0.75)):
        angle = torch.tensor(2 * np.pi * 3 / wavelength)
        torch.testing.assert_close(table[0, 3, channel], angle.sin().float())
        torch.testing.assert_close(table[1, 3, 4 + channel], angle.cos().float())
        torch.testing.assert_close(table[1, 3, 8 + channel], (angle / 3).sin().float())


@pytest.mark.parametrize('mode', [FakeTensorMode, torch.inference_mode])
def test_no_other_mode_stays_behind(mode):
    """Sizes that no other test has: what is kept for them comes from that mode."""
    decoder = GreenMIMPretrainDecoder(8, 52, decoder_num_heads=4)
    mask = random_mask(21, 0.5, np.random.default_rng(0))
    with mode():
        GreenMIMPretrainDecoder(8, 52, decoder_num_heads=4)(torch.rand(1, 10, 8), mask, (3, 7))
    decoder(torch.rand(1, 10, 8), mask, (3, 7)).sum().backward()
    assert {type(p.grad) for p in decoder.parameters() if p.requires_grad} == {torch.Tensor}


def test_decoder_takes_wavelengths_and_scale():
    """With no block and nothing visible that differs, positions alone tell the units apart."""
    decoder = GreenMIMPretrainDecoder(
        8, 16, decoder_depth=0, decoder_num_heads=4, position_wavelengths=(4, 40), position_scale=3
    )
    seen = []
    decoder.decoder_norm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    decoder(torch.zeros(1, 1, 8), np.array([False, True, True, True]), (2, 2))
    expected = 3 * torch.from_numpy(sincos_position_embedding((2, 2), 16, (4, 40)))
    torch.testing.assert_close(seen[0][0, 1:], (decoder.mask_token[0] + expected[1:]).detach())


def test_decoder_puts_features_in_their_places():
    """With one visible feature changed, nothing but that unit's own token differs at the input."""
    decoder = GreenMIMPretrainDecoder(8, decoder_embed_dim=16, decoder_depth=0, decoder_num_heads=4)
    decoder.init_weights()
    mask = np.array([True, False, True, True, False, True])
    x = torch.rand(1, 2, 8)
    changed = x.clone()
    changed[0, 1] += 1
    difference = (decoder(x, mask, (2, 3)) - decoder(changed, mask, (2, 3))).abs().sum(-1)[0]
    assert difference.nonzero().flatten().tolist() == [4]


def test_decoder_refuses():
    with pytest.raises(ValueError, match='decoder_embed_dim=30'):
        GreenMIMPretrainDecoder(8, decoder_embed_dim=30)
    for wrong in ((0, 4), (40, 4)):
        with pytest.raises(ValueError, match=r'position_wavelengths=.*0 < shortest <= longest'):
            GreenMIMPretrainDecoder(8, 16, decoder_num_heads=4, position_wavelengths=wrong)
    decoder = GreenMIMPretrainDecoder(8, decoder_embed_dim=16, decoder_num_heads=4)
    with pytest.raises(ValueError, match='3 features for a mask that leaves 2'):
        decoder(torch.rand(1, 3, 8), np.array([True, False, False, True]), (2, 2))
    with pytest.raises(ValueError, match='grid=None'):
        decoder(torch.rand(1, 2, 8), np.array([True, False, False, True]))
    with pytest.raises(ValueError, match='norm_cfg=.*BN.* is not supported'):
        GreenMIMPretrainDecoder(8, norm_cfg=dict(type='BN'))


def test_hidden_units_alone_are_painted_as_among_all(model):
    images, mask = torch.rand(2, 3, 96, 64), np.array([True, False, True, True, False, True])
    features = model.backbone(images, mask)
    every = model.neck(features, mask, (3, 2))
    torch.testing.assert_close(
        model.neck(features, mask, (3, 2), hidden_only=True), every[:, torch.from_numpy(mask)]
    )


def test_neck_of_another_width():
    """An arch changed, and the neck forgotten."""
    config = dict(CONFIG, neck=dict(CONFIG['neck'], embed_dim=768))
    with pytest.raises(ValueError, match='neck.embed_dim=768.*has 128 channels; set embed_dim=128'):
        GreenMIM(**config)


def test_frozen_norms_of_the_decoder():
    decoder = GreenMIMPretrainDecoder(8, norm_cfg=dict(type='LN', eps=1e-3, requires_grad=False))
    norms = [m for m in decoder.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 3
    for norm in norms:
        assert norm.eps == 1e-3 and not norm.weight.requires_grad and not norm.bias.requires_grad
