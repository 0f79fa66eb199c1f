"""GreenSwin: the masked network is the dense one, and the dense one is Swin."""

import numpy as np
import pytest
import timm
import torch
from plain_swin import plain_swin

from greenmim_mm.archs import SWIN_ARCHS
from greenmim_mm.models import GreenSwin
from greenmim_mm.ops import BACKENDS, random_mask

MINI = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))


def make(dtype=torch.float64, **kwargs) -> GreenSwin:
    """A small network whose every parameter is random: zeros and ones would hide mistakes."""
    torch.manual_seed(0)
    kwargs = {'arch': MINI, 'drop_path_rate': 0.0, **kwargs}
    model = GreenSwin(**kwargs).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def images(height, width, batch=2, dtype=torch.float64):
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype
    )


SIZES = [(224, 224), (192, 192), (128, 224), (96, 64), (32, 96)]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('window_size', [4, 7, 12, (12, 6, 3, 2)])
@pytest.mark.parametrize('pad_small_map', [False, True])
def test_masked_equals_dense_without_hidden_tokens(size, window_size, pad_small_map):
    model = make(window_size=window_size, pad_small_map=pad_small_map)
    x = images(*size)
    rows, columns = size[0] // 32, size[1] // 32
    rng = np.random.default_rng(0)
    one = np.ones(rows * columns, dtype=bool)
    one[-1] = False
    for mask in (
        random_mask(rows * columns, 0.75, rng),
        random_mask(rows * columns, 0.3, rng),
        one,
    ):
        mask = torch.from_numpy(mask)
        out = model(x, mask)
        _, expected = plain_swin(model, x, mask.view(rows, columns))
        assert out.shape == (2, int((~mask).sum()), 128)
        torch.testing.assert_close(out, expected.flatten(1, 2)[:, ~mask], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('window_size', [4, 7, (12, 6, 3, 2)])
@pytest.mark.parametrize('pad_small_map', [False, True])
def test_nothing_masked_equals_dense(size, window_size, pad_small_map):
    model = make(window_size=window_size, pad_small_map=pad_small_map)
    x = images(*size)
    mask = torch.zeros(size[0] // 32 * (size[1] // 32), dtype=torch.bool)
    dense = model(x)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(model(x, mask), dense, rtol=1e-9, atol=1e-9)


def test_hidden_pixels_do_not_matter():
    """Not even when they are NaN."""
    model = make()
    x = images(128, 128)
    mask = torch.from_numpy(random_mask(16, 0.75, np.random.default_rng(0)))
    before = model(x, mask)
    hidden = mask.view(4, 4).repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(model(x.masked_fill(hidden, float('nan')), mask), before)


def test_gradients_of_the_masked_network():
    """Against the plain network, for every parameter."""
    model = make(window_size=7)
    x = images(128, 96)
    mask = torch.from_numpy(random_mask(12, 0.6, np.random.default_rng(0)))
    weight = torch.randn(2, 4, 128, dtype=torch.float64)
    assert int((~mask).sum()) == 4
    masked = (model(x, mask) * weight).sum()
    plain = (plain_swin(model, x, mask.view(4, 3))[1].flatten(1, 2)[:, ~mask] * weight).sum()
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(masked, list(parameters.values()))
    theirs = torch.autograd.grad(plain, list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize('backend', BACKENDS)
def test_backends_agree(backend):
    model = make(window_size=4)
    x = images(64, 96)
    mask = torch.from_numpy(random_mask(6, 0.5, np.random.default_rng(0)))
    dense, masked = model(x)[0], model(x, mask)
    for stage in model.stages:
        for block in stage.blocks:
            block.attn.w_msa.backend = backend
    torch.testing.assert_close(model(x)[0], dense, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x, mask), masked, rtol=1e-10, atol=1e-10)


ODD = [(224, 224), (101, 133), (64, 250), (33, 47)]


@pytest.mark.parametrize('size', ODD)
def test_dense_equals_mmdet(size):
    from mmdet.models.backbones import SwinTransformer

    stock = SwinTransformer(
        embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), drop_path_rate=0.0
    )
    model = make(torch.float32, out_indices=(0, 1, 2, 3), pad_small_map=True)
    stock.load_state_dict(model.state_dict(), strict=True)
    stock.eval()
    x = images(*size, dtype=torch.float32)
    for ours, theirs in zip(model(x), stock(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('size', [*ODD, (224, 448)])
@pytest.mark.parametrize('pad_small_map', [False, True])
def test_dense_equals_mmpretrain(size, pad_small_map):
    from mmpretrain.models import SwinTransformer

    if not pad_small_map and min(size) < 200:  # mmpretrain refuses maps smaller than a window
        size = (size[0] * 7, size[1] * 7)
    arch = {key: list(value) if key != 'embed_dims' else value for key, value in MINI.items()}
    stock = SwinTransformer(
        arch, drop_path_rate=0.0, out_indices=(0, 1, 2, 3), pad_small_map=pad_small_map
    )
    model = make(torch.float32, out_indices=(0, 1, 2, 3), pad_small_map=pad_small_map)
    stock.load_state_dict(model.state_dict(), strict=True)
    stock.eval()
    x = images(*size, batch=1, dtype=torch.float32)
    for ours, theirs in zip(model(x), stock(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('size', 'window_size'), [(224, 7), (256, 4), (224, 14)])
def test_dense_equals_timm(size, window_size):
    """Through the channel order that timm shares with Microsoft's code.

    Only where windows fit the map: timm pads after the cyclic shift, OpenMMLab before it.
    """
    from greenmim_mm.checkpoint import convert_state_dict

    stock = timm.create_model(
        'swin_tiny_patch4_window7_224',
        embed_dim=16,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=window_size,
        img_size=size,
        num_classes=0,
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    # timm keeps the merging before a stage instead of behind it.
    renamed = {}
    for key, value in stock.state_dict().items():
        parts = key.split('.')
        if len(parts) > 2 and parts[2] == 'downsample':
            parts[1] = str(int(parts[1]) - 1)
        renamed['encoder.' + '.'.join(parts)] = value
    converted = convert_state_dict(renamed, source='greenmim', target='mmdet')
    # timm's table covers no more than the map: 7x7 at the last stage.
    window_sizes = tuple(min(window_size, size >> stage) for stage in (2, 3, 4, 5))
    model = make(torch.float32, window_size=window_sizes)
    model.load_state_dict({k.removeprefix('backbone.'): v for k, v in converted.items()})
    x = images(size, size, dtype=torch.float32)
    expected = stock.forward_features(x).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_archs_are_those_of_mmpretrain():
    from mmpretrain.models import SwinTransformer

    for name, settings in SWIN_ARCHS.items():
        stock = SwinTransformer.arch_zoo[name]
        assert {key: list(np.atleast_1d(value)) for key, value in settings.items()} == {
            key: list(np.atleast_1d(value)) for key, value in stock.items()
        }


def test_layer_depth_is_mmpretrains():
    from mmpretrain.models import SwinTransformer

    arch = dict(embed_dims=16, depths=[2, 2, 6, 2], num_heads=[1, 2, 4, 8])
    stock, model = SwinTransformer(arch), GreenSwin(arch)
    for name, _ in model.named_parameters():
        for prefix in ('', 'backbone.'):
            assert model.get_layer_depth(prefix + name, prefix) == stock.get_layer_depth(
                prefix + name, prefix
            )
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (13, 14)


def test_checkpointing_and_drop_path_keep_the_gradients():
    x = images(64, 64)
    mask = torch.tensor([False, True, False, True])
    grads = []
    for switch in (
        dict(),
        dict(with_cp='mlp'),
        dict(with_cp=True),
        dict(with_cp=3),
        dict(recompute=False),
        dict(sequential_groups=1),
        dict(sequential_groups=3, with_cp=2),
    ):
        model = make(window_size=4, drop_path_rate=0.5, **switch).train()
        torch.manual_seed(3)
        (model(x, mask).square().sum() + model(x)[0].square().sum()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, *recomputed in zip(*grads, strict=True):
        for grad in recomputed:
            torch.testing.assert_close(grad, plain, rtol=1e-10, atol=1e-10)


def test_every_nth_block_is_checkpointed():
    model = GreenSwin(MINI, with_cp=3)
    assert [block.with_cp for block in model.blocks()] == [False, False, True] * 2 + [False] * 2
    assert all(block.with_cp for block in GreenSwin(MINI, with_cp=1).blocks())


def test_sequential_groups_bound_the_attention_weights(monkeypatch):
    from greenmim_mm.ops import attention

    sizes = []
    weights = attention._weights

    def record(q, *args):
        sizes.append(q.shape[2])
        return weights(q, *args)

    monkeypatch.setattr(attention, '_weights', record)
    model = make(window_size=4, sequential_groups=3)
    model(images(96, 96))[0].sum().backward()
    assert max(sizes) == 3


def test_frozen_stages():
    model = make(frozen_stages=1, out_indices=(0, 3)).train()
    assert not model.patch_embed.training and not model.stages[1].training
    assert model.stages[2].training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = ('patch_embed', 'stages.0', 'stages.1', 'norm0')
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(expected)}
    model(images(64, 64))[-1].sum().backward()
    assert model.stages[2].blocks[0].norm1.weight.grad is not None


@pytest.mark.parametrize('backend', ['recompute', 'fused', 'math'])
def test_dense_plan_made_in_inference_mode_serves_training(backend):
    model = make(torch.float32)
    for module in model.modules():
        if hasattr(module, 'backend'):
            module.backend = backend
    # A size of its own: what another test has planned would hide what inference leaves.
    x = images(72, 104 + 4 * len(backend), dtype=torch.float32)
    with torch.inference_mode():
        model(x)
    model(x)[0].sum().backward()


def test_table_of_another_window_is_resized_while_loading():
    small, large = make(torch.float32, window_size=4), make(torch.float32, window_size=7)
    large.load_state_dict(small.state_dict(), strict=True)
    name = 'stages.0.blocks.0.attn.w_msa.relative_position_bias_table'
    old, new = small.state_dict()[name], large.state_dict()[name]
    expected = torch.nn.functional.interpolate(
        old.t().reshape(1, -1, 7, 7), size=(13, 13), mode='bicubic'
    )
    torch.testing.assert_close(new, expected.reshape(-1, 169).t())


def test_default_initialisation():
    model = GreenSwin('tiny')
    model.init_weights()
    weight = model.stages[0].blocks[0].attn.w_msa.qkv.weight
    assert 0.015 < weight.std() < 0.025
    table = model.stages[2].blocks[0].attn.w_msa.relative_position_bias_table
    assert 0.015 < table.std() < 0.025
    assert model.norm3.weight.eq(1).all() and model.norm3.bias.eq(0).all()


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='huge'), "arch='huge' is unknown"),
        (dict(arch=dict(embed_dims=16)), 'dict with keys'),
        (dict(arch=dict(MINI, depths=(2, 2))), 'four positive'),
        (dict(arch=dict(MINI, num_heads=(3, 2, 4, 8))), '16 channels of stage 0.*3 heads'),
        (dict(arch=7), 'arch=7'),
        (dict(window_size=0), 'window_size=0'),
        (dict(window_size=(7, 7)), r'window_size=\(7, 7\)'),
        (dict(window_size=3.5), 'window_size=3.5'),
        (dict(img_size=-1), 'img_size=-1'),
        (dict(img_size=(224, 224, 3)), 'img_size='),
        (dict(with_cp='blocks'), "with_cp='blocks'"),
        (dict(sequential_groups=0), 'sequential_groups=0'),
        (dict(drop_path_rate=1.0), 'drop_path_rate=1.0'),
        (dict(out_indices=(4,)), r'out_indices=\(4,\)'),
        (dict(out_indices=()), 'out_indices='),
        (dict(frozen_stages=4), 'frozen_stages=4 must be a stage from 0 to 3'),
        (dict(norm_cfg=dict(type='BN')), r"norm_cfg=\{'type': 'BN'\} is not supported"),
        (dict(norm_cfg=dict(type='LN', momentum=0.1)), 'norm_cfg=.*momentum'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GreenSwin(**{'arch': MINI, **kwargs})


@pytest.mark.parametrize(
    ('shape', 'mask', 'error', 'message'),
    [
        ((1, 3, 100, 128), torch.zeros(12).bool(), ValueError, '100x128.*multiples of 32'),
        ((1, 3, 96, 128), torch.zeros(5).bool(), ValueError, r'mask has shape \(5,\)'),
        ((1, 3, 96, 128), torch.zeros(12), TypeError, 'bool'),
        ((1, 3, 96, 128), torch.ones(12).bool(), ValueError, 'hides all 12'),
        ((1, 1, 96, 128), None, ValueError, r'\(1, 1, 96, 128\)'),
        ((3, 96, 128), None, ValueError, r'\(3, 96, 128\)'),
    ],
)
def test_bad_inputs(shape, mask, error, message):
    with pytest.raises(error, match=message):
        make(torch.float32)(torch.zeros(shape), mask)


def test_masked_use_needs_the_last_norm():
    with pytest.raises(ValueError, match='put 3 into out_indices'):
        make(torch.float32, out_indices=(0, 1))(torch.zeros(1, 3, 64, 64), torch.zeros(4).bool())


def test_is_found_by_scope_in_any_registry():
    """No custom_imports needed."""
    from mmengine.registry import MODELS

    config = dict(type='greenmim_mm.GreenSwin', arch=MINI)
    assert type(MODELS.build(config)) is GreenSwin


def test_norm_cfg():
    model = make(norm_cfg=dict(type='LN', eps=1e-3, requires_grad=False))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 2 * 8 + 3 + 1
    for norm in norms:
        assert norm.eps == 1e-3 and not norm.weight.requires_grad and not norm.bias.requires_grad
    model(images(64, 64))[0].sum().backward()
    assert model.patch_embed.norm.weight.grad is None
    assert model.stages[0].blocks[0].attn.w_msa.qkv.weight.grad is not None


@pytest.mark.parametrize(
    ('kwargs', 'unused'),
    [
        (dict(window_size=7), []),
        (dict(window_size=14), [(14, 7, 3, 560, 729)]),
        (dict(window_size=(14, 14, 14, 7)), []),
        (dict(window_size=14, pad_small_map=True), []),
        (dict(window_size=7, img_size=(160, 224)), [(7, 5, 3, 88, 169)]),
    ],
)
def test_rows_that_are_never_trained_are_told(kwargs, unused, monkeypatch):
    from greenmim_mm.models import green_swin

    told = []
    monkeypatch.setattr(green_swin, 'print_log', lambda text, logger: told.append(text))
    GreenSwin(MINI, **kwargs)
    assert len(told) == len(unused)
    for text, (window, side, stage, rows, total) in zip(told, unused, strict=True):
        assert f'windows of {window} on the map of {side} tokens that stage {stage} has' in text
        assert f'{rows} of {total} rows' in text and f'window_size={side}' in text


def test_rows_that_are_told_get_no_gradient():
    """Windows of 14 on the map of 7 tokens: 13 x 13 of 27 x 27 rows are used."""
    model = make(torch.float32, window_size=14)
    mask = torch.from_numpy(random_mask(49, 0.2, np.random.default_rng(0)))
    model(images(224, 224, dtype=torch.float32), mask).sum().backward()
    used = [
        int(stage.blocks[0].attn.w_msa.relative_position_bias_table.grad.any(dim=1).sum())
        for stage in model.stages
    ]
    # Where a mask hides corners, their offsets do not meet.
    assert 150 < used[3] <= 169 and 700 < min(used[:3])


def test_a_network_for_each_side_of_a_narrow_map():
    """A map of 4 x 12 tokens under windows of 7 is cut into three windows of 4, as Swin does.

    Against attention over those three windows alone, written down here without a plan.
    """
    model = make(window_size=(4, 7, 7, 7), out_indices=(1, 3))
    attention = model.stages[1].blocks[1].attn.w_msa
    x = torch.randn(2, 48, 32, dtype=torch.float64)
    plans = model._dense_plans(1, (4, 12), x.device)
    qkv = attention.qkv(x).view(2, 4, 3, 4, 3, 2, 16)  # image, row, window, column, qkv, head
    q, k, v = qkv.permute(4, 0, 2, 5, 1, 3, 6).flatten(4, 5)
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    offset = (row[:, None] - row + 6) * 13 + column[:, None] - column + 6
    bias = attention.relative_position_bias_table[offset].permute(2, 0, 1)
    weight = (q @ k.transpose(-2, -1) / 4 + bias).softmax(-1)
    out = (weight @ v).unflatten(3, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(2, 48, 32)
    for plan in plans:  # the shifted one, too
        torch.testing.assert_close(attention(x, plan), attention.proj(out))
