"""GreenSwinV2: the masked network is the dense one, and the dense one is Swin V2."""

import numpy as np
import pytest
import timm
import torch
from plain_swin import plain_swin
from torch.nn import functional as F

from greenmim_mm.archs import SWINV2_ARCHS
from greenmim_mm.checkpoint import CheckpointError
from greenmim_mm.compat import compiles_plans
from greenmim_mm.models import GreenSwin, GreenSwinV2
from greenmim_mm.ops import BACKENDS, random_mask

MINI = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), extra_norm_every_n_blocks=2)


def make(dtype=torch.float64, **kwargs) -> GreenSwinV2:
    """A small network whose every parameter is random: zeros and ones would hide mistakes."""
    torch.manual_seed(0)
    kwargs = {'arch': MINI, 'drop_path_rate': 0.0, 'window_size': 4, **kwargs}
    model = GreenSwinV2(**kwargs).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for block in model.blocks():  # some heads beyond the clamp
            block.attn.w_msa.logit_scale.add_(torch.randn_like(block.attn.w_msa.logit_scale) * 2)
    return model.eval()


def images(height, width, batch=2, dtype=torch.float64):
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype
    )


CASES = [
    ((256, 256), 8, False),
    ((192, 192), (12, 12, 12, 6), False),
    ((128, 224), (12, 6, 3, 2), False),
    ((128, 224), 7, True),
    ((96, 64), 8, True),
]


@pytest.mark.parametrize(('size', 'window_size', 'pad_small_map'), CASES)
@pytest.mark.parametrize('pretrained', [(0, 0, 0, 0), (6, 6, 6, 3)])
def test_masked_equals_dense_without_hidden_tokens(size, window_size, pad_small_map, pretrained):
    model = make(
        window_size=window_size, pad_small_map=pad_small_map, pretrained_window_sizes=pretrained
    )
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


@pytest.mark.parametrize(('size', 'window_size', 'pad_small_map'), CASES)
def test_nothing_masked_equals_dense(size, window_size, pad_small_map):
    model = make(window_size=window_size, pad_small_map=pad_small_map)
    x = images(*size)
    mask = torch.zeros(size[0] // 32 * (size[1] // 32), dtype=torch.bool)
    dense = model(x)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(model(x, mask), dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('qkv_bias', 'size'), [(True, (128, 96)), (False, (96, 96))])
def test_gradients_of_the_masked_network(qkv_bias, size):
    """Against the plain network, for every parameter, with padding tokens."""
    model = make(window_size=7, pad_small_map=True)
    x = images(*size)
    units = size[0] // 32, size[1] // 32
    mask = torch.from_numpy(random_mask(units[0] * units[1], 0.6, np.random.default_rng(0)))
    weight = torch.randn(2, int((~mask).sum()), 128, dtype=torch.float64)
    masked = (model(x, mask) * weight).sum()
    plain = (plain_swin(model, x, mask.view(units))[1].flatten(1, 2)[:, ~mask] * weight).sum()
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(masked, list(parameters.values()))
    theirs = torch.autograd.grad(plain, list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize('backend', BACKENDS)
def test_backends_agree(backend):
    model = make(window_size=4, pad_small_map=True)
    x = images(64, 96)
    mask = torch.from_numpy(random_mask(6, 0.5, np.random.default_rng(0)))
    dense, masked = model(x)[0], model(x, mask)
    for block in model.blocks():
        block.attn.w_msa.backend = backend
    torch.testing.assert_close(model(x)[0], dense, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x, mask), masked, rtol=1e-10, atol=1e-10)


def stock_arch():
    return {key: list(v) if isinstance(v, tuple) else v for key, v in MINI.items()}


@pytest.mark.parametrize(
    ('size', 'window_size', 'pretrained', 'pad_small_map'),
    [
        ((256, 256), 8, 0, False),
        ((256, 512), (16, 16, 16, 8), 8, False),
        ((224, 320), 7, 12, False),
        ((101, 133), 7, 0, True),
        ((64, 250), 12, 6, True),
    ],
)
def test_dense_equals_mmpretrain(size, window_size, pretrained, pad_small_map):
    """With the windows of pre-training and with others: mmpretrain's own transfer."""
    from mmpretrain.models import SwinTransformerV2

    kwargs = dict(
        window_size=window_size,
        pretrained_window_sizes=(pretrained,) * 4,
        pad_small_map=pad_small_map,
        out_indices=(0, 1, 2, 3),
    )
    stock = SwinTransformerV2(stock_arch(), drop_path_rate=0.0, **kwargs)
    model = make(**kwargs)
    # mmpretrain drops the buffers of a checkpoint while loading.
    result = stock.load_state_dict(model.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(k.endswith(('coords_table', 'position_index')) for k in result.missing_keys)
    assert stock.state_dict().keys() == model.state_dict().keys()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(value.double(), model.state_dict()[name].double())
    stock.eval()
    x = images(*size, batch=1)
    # mmpretrain's offsets were rounded to float32 at another place.
    for ours, theirs in zip(model(x), stock.double()(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_move_to_another_window_as_in_mmpretrain():
    """Pre-train at window 4, use at 8 and on a larger image: nothing but the config changes."""
    from mmpretrain.models import SwinTransformerV2

    small = make(window_size=4)
    x = images(256, 320, batch=1)
    settings = dict(window_size=8, pretrained_window_sizes=(4, 4, 4, 4))
    large = GreenSwinV2(MINI, drop_path_rate=0.0, **settings).double().eval()
    large.load_state_dict(small.state_dict(), strict=True)
    stock = SwinTransformerV2(stock_arch(), drop_path_rate=0.0, **settings).double()
    stock.load_state_dict(small.state_dict(), strict=False)
    stock.eval()
    torch.testing.assert_close(large(x)[0], stock(x)[0], rtol=1e-5, atol=1e-5)
    # Without a word about the pre-training, offsets would be stretched instead of extrapolated.
    stretched = GreenSwinV2(MINI, drop_path_rate=0.0, window_size=8)
    with pytest.raises(ValueError, match=r'a window of 4 in pre-training, this GreenSwinV2 by 8'):
        stretched.load_state_dict(small.state_dict(), strict=True)
    without = {k: v for k, v in small.state_dict().items() if not k.endswith('coords_table')}
    stretched.double().eval().load_state_dict(without, strict=False)
    assert not torch.allclose(stretched(x)[0], large(x)[0], atol=1e-3)


@pytest.mark.parametrize(('size', 'window_size'), [(256, 8), (256, 16), (192, 12)])
def test_dense_equals_timm(size, window_size):
    """Only where windows fit the map: timm pads after the cyclic shift, OpenMMLab before it."""
    stock = timm.create_model(
        'swinv2_tiny_window8_256',
        embed_dim=16,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=window_size,
        img_size=size,
        num_classes=0,
    ).eval()
    window_sizes = tuple(min(window_size, size >> stage) for stage in (2, 3, 4, 5))
    arch = dict(MINI, extra_norm_every_n_blocks=0)
    model = make(arch=arch, window_size=window_sizes)
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith(('relative_coords_table', 'relative_position_index')):
            continue
        if key.endswith('downsample.reduction.weight'):  # (C, row, column) to (column, row, C)
            value = value.unflatten(1, (-1, 2, 2)).transpose(1, 3).flatten(1)
        for ours, theirs in (
            ('patch_embed.projection', 'patch_embed.proj'),
            ('stages', 'layers'),
            ('attn.w_msa', 'attn'),
            ('ffn.layers.0.0', 'mlp.fc1'),
            ('ffn.layers.1', 'mlp.fc2'),
            ('norm3.', 'norm.'),
        ):
            key = key.replace(ours, theirs)
        state[key] = value
    stock.load_state_dict(state, strict=True)
    x = images(size, size)
    expected = stock.double().forward_features(x).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_archs_are_those_of_mmpretrain():
    from mmpretrain.models import SwinTransformerV2

    for name, settings in SWINV2_ARCHS.items():
        stock = SwinTransformerV2.arch_zoo[name]
        assert {key: list(np.atleast_1d(value)) for key, value in settings.items()} == {
            key: list(np.atleast_1d(value)) for key, value in stock.items()
        }


def test_memory_switches_keep_the_gradients():
    x = images(64, 64)
    mask = torch.tensor([False, True, False, True])
    grads = []
    for switch in (
        dict(),
        dict(with_cp='mlp'),
        dict(with_cp=True),
        dict(with_cp=2),
        dict(recompute=False),
        dict(sequential_groups=1),
        dict(sequential_groups=3, with_cp=True),
    ):
        model = make(drop_path_rate=0.5, pad_small_map=True, **switch).train()
        torch.manual_seed(3)
        (model(x, mask).square().sum() + model(x)[0].square().sum()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, *others in zip(*grads, strict=True):
        for grad in others:
            torch.testing.assert_close(grad, plain, rtol=1e-10, atol=1e-10)


def cpu_has_float16() -> bool:
    """Whether this torch multiplies float16 on a CPU; 2.1 does not."""
    try:
        F.linear(torch.ones(1, 1, dtype=torch.float16), torch.ones(1, 1, dtype=torch.float16))
    except RuntimeError:
        return False
    return True


float16 = pytest.param(
    torch.float16,
    marks=pytest.mark.skipif(not cpu_has_float16(), reason='no float16 on a CPU in this torch'),
)


@pytest.mark.parametrize('dtype', [float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [0.0, 4.6, 50.0, 1e4])
def test_large_scales_do_not_overflow_in_half_precision(dtype, scale):
    model = make(torch.float32)
    with torch.no_grad():
        for block in model.blocks():
            block.attn.w_msa.logit_scale.fill_(scale)
    x = images(128, 128, dtype=torch.float32)
    mask = torch.from_numpy(random_mask(16, 0.75, np.random.default_rng(0)))
    with torch.autocast('cpu', dtype):
        out = model(x, mask)
        loss = out.float().square().mean()
    loss.backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_default_initialisation():
    model = GreenSwinV2('tiny')
    model.init_weights()
    block = model.stages[0].blocks[0]
    assert 0.015 < block.attn.w_msa.qkv.weight.std() < 0.025
    assert block.attn.w_msa.logit_scale.exp().allclose(torch.tensor(10.0))
    assert block.norm1.weight.eq(0).all() and block.norm2.bias.eq(0).all()
    assert model.norm3.weight.eq(1).all()
    assert model.stages[1].downsample.norm.weight.eq(1).all()


def test_layer_depth_counts_merging_to_the_block_below():
    """As for V1, where the merging is kept in the stage below."""
    v2 = GreenSwinV2(MINI)
    v1 = GreenSwin({key: MINI[key] for key in ('embed_dims', 'depths', 'num_heads')})
    for stage in (0, 1, 2):
        ours = v2.get_layer_depth(f'stages.{stage + 1}.downsample.reduction.weight')
        assert ours == v1.get_layer_depth(f'stages.{stage}.downsample.reduction.weight')
    name = 'stages.2.blocks.1.attn.w_msa.qkv.weight'
    assert v2.get_layer_depth(name) == v1.get_layer_depth(name)


def test_frozen_stages():
    model = make(frozen_stages=1, out_indices=(0, 3)).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = ('patch_embed', 'stages.0', 'stages.1', 'norm0')
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(expected)}
    model(images(128, 128))[-1].sum().backward()
    assert model.stages[2].downsample.reduction.weight.grad is not None


@pytest.mark.skipif(not compiles_plans(), reason='TorchDynamo of torch 2.1 fails on plans')
def test_compiles_in_one_graph():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = GreenSwinV2(MINI, window_size=8, drop_path_rate=0.0)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    rng = np.random.default_rng(0)
    x = torch.randn(2, 3, 256, 256)
    for _ in range(6):
        mask = random_mask(64, 0.75, rng)
        torch.testing.assert_close(compiled(x, mask), model(x, mask), rtol=1e-4, atol=1e-4)
    assert 1 <= counter.frame_count <= 5


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='enormous'), "arch='enormous' is unknown"),
        (dict(arch=dict(embed_dims=16)), 'extra_norm_every_n_blocks'),
        (dict(arch=dict(MINI, extra_norm_every_n_blocks=-1)), 'extra_norm_every_n_blocks=-1'),
        (dict(pretrained_window_sizes=(8, 8)), r'pretrained_window_sizes=\(8, 8\) must be 4'),
        (dict(pretrained_window_sizes=8), 'pretrained_window_sizes=8'),
        (dict(pretrained_window_sizes=(8, 8, 8, -1)), 'pretrained_window_sizes='),
        (dict(with_cp=-1), 'with_cp=-1'),
        (dict(with_cp='blocks'), "with_cp='blocks'"),
        (dict(sequential_groups=0), 'sequential_groups=0'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GreenSwinV2(**{'arch': MINI, **kwargs})


def test_window_larger_than_the_map():
    model = make(torch.float32, window_size=8)
    remedy = r'window_size=8 of stage 2.*8x6 tokens; use window_size=\(8, 8, 6, 3\), or pad_small'
    with pytest.raises(ValueError, match=r'stage 2 is larger than its map of 6x8'):
        model(images(96, 128, dtype=torch.float32))
    with pytest.raises(ValueError, match=remedy):
        model(images(128, 96, dtype=torch.float32), torch.zeros(12).bool())


@pytest.mark.parametrize('source', ['GreenSwin', 'GreenSwinV2'])
def test_weights_of_the_other_version_are_refused(source, tmp_path):
    """With the reason."""
    arch = {key: MINI[key] for key in ('embed_dims', 'depths', 'num_heads')}
    v1 = GreenSwin(arch, window_size=4)
    v2 = GreenSwinV2(dict(arch, extra_norm_every_n_blocks=0), window_size=4)
    model, other = (v1, v2) if source == 'GreenSwinV2' else (v2, v1)
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    model.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'other.pth'))
    version = {'GreenSwin': 'V1', 'GreenSwinV2': 'V2'}[source]
    with pytest.raises(CheckpointError, match=f'Swin {version} weights.*{source}'):
        model.init_weights()


def test_is_found_by_scope_in_any_registry():
    from mmengine.registry import MODELS

    assert type(MODELS.build(dict(type='greenmim_mm.GreenSwinV2', arch=MINI))) is GreenSwinV2
