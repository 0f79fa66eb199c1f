"""Tools that change modules: hooks, LoRA, pruning, parametrisation, quantisation.

Whatever stands in the place of a layer is called, and what it does has its effect.
"""

import copy

import pytest
import torch
from mini_swins import ARCH, images, make, run
from torch import nn
from torch.nn.utils import parametrize, prune, weight_norm

from greenmim_mm.models import lean
from greenmim_mm.models.layers import FFN

both = pytest.mark.parametrize('name', ['v1', 'v2'])
uses = pytest.mark.parametrize('use', ['dense', 'masked'])


def leaves(model):
    return {name: module for name, module in model.named_modules() if not list(module.children())}


@both
@uses
def test_hooks_fire_on_every_leaf(name, use):
    model = make(name).train()
    expected = run(model, use)
    forward, backward = set(), set()
    for key, module in leaves(model).items():
        module.register_forward_hook(lambda *_, key=key: forward.add(key))
        module.register_full_backward_hook(lambda *_, key=key: backward.add(key))
    out = run(model, use)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert forward == set(leaves(model))
    # The offsets of Swin V2 are a buffer: the first layer of its position network has no gradient
    # to hand back, but its own hook is called as any other.
    assert backward == set(leaves(model))


@both
@uses
def test_what_a_hook_changes_is_seen(name, use):
    """Every leaf decides about the output, those without parameters as well."""
    model = make(name).train()
    before = run(model, use)
    for key, module in leaves(model).items():
        handle = module.register_forward_hook(lambda module, args, out: out + 1 + out.square())
        assert not torch.allclose(run(model, use), before, atol=1e-4), key
        handle.remove()
    torch.testing.assert_close(run(model, use), before, rtol=0, atol=0)


@both
@uses
def test_what_a_backward_hook_changes_is_seen(name, use):
    """Every leaf that hands a gradient back decides about the gradients of what lies below it."""
    model = make(name).train()
    x = images().requires_grad_()
    wanted = [x, *model.parameters()]

    def gradients():
        return torch.autograd.grad(run(model, use, x).square().sum(), wanted)

    before = gradients()
    for key, module in leaves(model).items():
        if key.endswith('cpb_mlp.0'):  # its input is a buffer
            continue
        handle = module.register_full_backward_hook(
            lambda module, inputs, outputs: tuple(2 * grad for grad in inputs)
        )
        after = gradients()
        handle.remove()
        assert any((a - b).norm() > 0.1 * b.norm() for a, b in zip(after, before, strict=True)), key


@both
@pytest.mark.parametrize('kind', ['attn', 'attn.w_msa', 'ffn', 'ffn.layers', 'drop_path'])
def test_hooks_on_containers(name, kind):
    model = make(name)
    calls = []
    model.stages[1].blocks[1].get_submodule(kind).register_forward_hook(
        lambda module, args, out: calls.append(args[0].shape) or out
    )
    run(model, 'masked').sum().backward()
    assert calls


class LoRA(nn.Linear):
    """Another class in the place of a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.a = nn.Parameter(torch.randn(2, linear.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(linear.out_features, 2) * 0.1)

    def forward(self, x):
        return super().forward(x) + x @ self.a.t() @ self.b.t()

    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.load_state_dict({k: v for k, v in self.state_dict().items() if k not in ('a', 'b')})
        linear.weight.data += (self.b @ self.a).data
        return linear


def replace(model: nn.Module, key: str, layer: nn.Module) -> None:
    """Put a layer in the place of another one (a method of modules since torch 2.5)."""
    parent, _, name = key.rpartition('.')
    setattr(model.get_submodule(parent), name, layer)


@both
@uses
def test_a_layer_of_ones_own(name, use):
    """All linear layers replaced: every low-rank matrix learns, merged weights are the same."""
    model = make(name).train()
    before = run(model, use)
    places = [k for k, m in model.named_modules() if isinstance(m, nn.Linear) and 'cpb' not in k]
    for key in places:
        replace(model, key, LoRA(model.get_submodule(key)))
    out = run(model, use)
    out.square().sum().backward()
    assert not torch.allclose(out, before, atol=1e-3)
    for key in places:
        layer = model.get_submodule(key)
        assert layer.a.grad.abs().sum() > 0 and layer.b.grad.abs().sum() > 0, key
    for key in places:
        replace(model, key, model.get_submodule(key).merged())
    torch.testing.assert_close(run(model, use), out, rtol=1e-3, atol=1e-4)


@both
@uses
def test_peft(name, use):
    from peft import LoraConfig, get_peft_model

    targets = ['qkv', 'proj', 'layers.0.0', 'layers.1']
    plain = make(name)
    model = get_peft_model(
        copy.deepcopy(plain), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    lora = {key: p for key, p in model.named_parameters() if 'lora_' in key}
    blocks = sum(plain.depths)
    assert len(lora) == 2 * 4 * blocks
    out = run(model, use)
    out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in lora.values())
    assert not torch.allclose(out, run(plain, use), atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged, use), out, rtol=1e-3, atol=1e-4)


@both
@uses
def test_lora_of_mmpretrain(name, use):
    from mmpretrain.models import LoRAModel
    from mmpretrain.models.peft.lora import LoRALinear

    plain = make(name)
    targets = [
        dict(type='qkv'),
        dict(type='proj'),
        dict(type='.*ffn.layers.*'),
        dict(type='.*reduction'),
    ]
    kind = f'greenmim_mm.{type(plain).__name__}'
    config = dict(type=kind, arch=ARCH, window_size=7, pad_small_map=True, drop_path_rate=0.0)
    model = LoRAModel(module=config, alpha=1, rank=2, drop_rate=0.0, targets=targets).eval()
    originals = {
        key.replace('original_layer.', ''): value
        for key, value in model.module.state_dict().items()
        if 'lora_' not in key
    }
    for key, value in originals.items():
        value.copy_(plain.state_dict()[key])
    lora = {key: p for key, p in model.named_parameters() if 'lora_' in key}
    assert len(lora) == 2 * (4 * sum(plain.depths) + 3)
    with torch.no_grad():
        for parameter in lora.values():  # the second matrix starts at zero
            parameter.add_(torch.randn_like(parameter) * 0.1)
    out = run(model.module, use)
    out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in lora.values())
    assert not torch.allclose(out, run(plain, use), atol=1e-3)
    # It has no function that merges.
    for key, layer in model.module.named_modules():
        if isinstance(layer, LoRALinear):
            product = layer.lora_up.weight @ layer.lora_down.weight
            plain.get_submodule(key).weight.data += layer.scaling * product.detach()
    torch.testing.assert_close(run(plain, use), out, rtol=1e-3, atol=1e-4)


def every_linear(model, change):
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            change(module)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    'weight_norm': lambda module: weight_norm(module),
    'parametrize': lambda module: parametrize.register_parametrization(module, 'weight', Doubled()),
    'prune': lambda module: prune.l1_unstructured(module, 'weight', amount=0.5),
}


def stock_swin():
    from mmdet.models.backbones import SwinTransformer

    model = SwinTransformer(**ARCH, out_indices=(3,), drop_path_rate=0.0)
    model.eval()  # returns nothing
    return model


@pytest.mark.parametrize('change', CHANGES)
def test_reparametrised_as_mmdets_swin(change):
    """Values and gradients are those of the stock network after the same change."""
    ours, stock = make('v1'), stock_swin()
    stock.load_state_dict(ours.state_dict(), strict=True)
    outs = []
    for model in (ours, stock):
        every_linear(model, CHANGES[change])
        out = run(model, 'dense')
        out.square().sum().backward()
        outs.append(out)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    grads = dict(stock.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[key].grad, rtol=1e-2, atol=1e-2, msg=key)


@both
@uses
@pytest.mark.parametrize('change', CHANGES)
def test_reparametrised(name, use, change):
    """As a network that was given the changed weights; a step of training moves them."""
    model = make(name)
    every_linear(model, CHANGES[change])
    out = run(model, use)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    plain = make(name)
    state = plain.state_dict()
    for key, module in model.named_modules():
        if key + '.weight' in state and hasattr(module, 'weight'):
            state[key + '.weight'] = module.weight.detach()
    plain.load_state_dict(state)
    torch.testing.assert_close(run(plain, use), out, rtol=1e-4, atol=1e-4)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert not torch.allclose(run(model, use), out, atol=1e-3)


def quantised(model, places=(nn.Linear,)):
    return torch.ao.quantization.quantize_dynamic(model, set(places), dtype=torch.qint8)


@both
@uses
@torch.no_grad()
def test_dynamic_quantisation(name, use):
    model = make(name)
    expected = run(model, use)
    out = run(quantised(model), use)
    assert not torch.equal(out, expected)
    assert (out - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_dynamic_quantisation_as_of_mmdets_swin():
    """Of the layers that are plain ones there, too: its MLPs have mmcv's, which are left alone."""
    ours, stock = make('v1'), stock_swin()
    stock.load_state_dict(ours.state_dict(), strict=True)
    places = [key for key, module in stock.named_modules() if type(module) is nn.Linear]
    assert len(places) == 2 * sum(ours.depths) + 3
    expected = run(ours, 'dense')
    first, second = (run(quantised(model, places), 'dense') for model in (ours, stock))
    assert (first - second).norm() < 0.1 * (first - expected).norm()


# What the lean path is taken for, and what it is not: one line for each reason.


def hooked(module):
    module.register_forward_pre_hook(lambda *_: None)
    return module


def patched(module):
    module.forward = type(module).forward.__get__(module)
    return module


def subclassed_weight(module):
    class Weight(nn.Parameter):
        pass

    module.weight = Weight(module.weight.data)
    return module


OBSTACLES = {
    'none': (lambda: nn.Linear(4, 4), nn.Linear, None),
    'no bias': (lambda: nn.Linear(4, 4, bias=False), nn.Linear, None),
    'frozen': (lambda: nn.Linear(4, 4).requires_grad_(False), nn.Linear, None),
    'hook': (lambda: hooked(nn.Linear(4, 4)), nn.Linear, 'hooks are registered on Linear'),
    'subclass': (lambda: LoRA(nn.Linear(4, 4)), nn.Linear, 'LoRA stands in the place of Linear'),
    'identity': (nn.Identity, nn.LayerNorm, 'Identity stands in the place of LayerNorm'),
    'forward': (
        lambda: patched(nn.Linear(4, 4)),
        nn.Linear,
        'forward method of Linear is replaced',
    ),
    'weight': (
        lambda: subclassed_weight(nn.Linear(4, 4)),
        nn.Linear,
        'weight of Linear is a Weight',
    ),
    'gelu': (lambda: nn.GELU('tanh'), nn.GELU, 'GELU has other settings'),
    'norm': (lambda: nn.LayerNorm(4, bias=False), nn.LayerNorm, 'LayerNorm has other settings'),
    'dropout': (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Dropout()),
        nn.Sequential,
        'Sequential has other settings',
    ),
    'container': (lambda: FFN(4, 8), FFN, None),
}


@pytest.mark.parametrize('case', OBSTACLES)
def test_obstacles(case):
    build, kind, reason = OBSTACLES[case]
    found = lean.obstacle([(build(), kind)])
    assert found is None if reason is None else reason in found


def test_hooks_for_all_modules_are_an_obstacle():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert 'all modules' in lean.obstacle([])
    finally:
        handle.remove()
    assert lean.obstacle([]) is None


def test_what_comes_after_an_obstacle_is_not_asked_for():
    def parts():
        yield nn.Identity(), FFN
        raise AssertionError

    assert 'Identity' in lean.obstacle(parts())


def test_the_log_says_once_why_memory_is_lost(monkeypatch):
    told = []
    monkeypatch.setattr(lean, 'print_log', lambda text, logger: told.append(text))
    lean._tell.cache_clear()
    model = make('v1').train()
    model.stages[0].blocks[0].norm1.register_forward_hook(lambda *_: None)
    for _ in range(2):
        run(model, 'masked').sum().backward()
    assert len(told) == 1 and 'hooks are registered on LayerNorm' in told[0]


@both
@uses
def test_an_untouched_network_is_lean(name, use, monkeypatch):
    """In training nothing but DropPath, norms behind branches and projections are called."""
    model = make(name).train()
    fused = []
    attention, mlp = type(model.stages[0].blocks[0].attn.w_msa), FFN
    if name == 'v1':
        plain = attention.fused
        monkeypatch.setattr(attention, 'fused', lambda *a: fused.append('attn') or plain(*a))
    ffn = mlp.fused
    monkeypatch.setattr(mlp, 'fused', lambda *a: fused.append('ffn') or ffn(*a))
    run(model, use).sum().backward()
    blocks = sum(model.depths)
    assert fused.count('ffn') == blocks and fused.count('attn') == (blocks if name == 'v1' else 0)
