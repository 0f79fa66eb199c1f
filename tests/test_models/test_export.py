"""Tools that trace: torch.export, ONNX, jit, compile, FLOP counters; and torch.func."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from mini_swins import ARCH, MODELS, images, make, mask, randomised, run
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from greenmim_mm.compat import compiles_plans

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'

both = pytest.mark.parametrize('name', ['v1', 'v2'])
traced = pytest.mark.usefixtures('dynamo')

FRESH = """
import sys
import torch
from mini_swins import MODELS, ARCH
from torch._subclasses.fake_tensor import FakeTensorMode

def check(name, side, way):
    torch.manual_seed(0)
    model = MODELS[name](ARCH, window_size=4, pad_small_map=True).eval()
    x = torch.randn(2, 3, side, side)
    if way == 'export':
        exported = torch.export.export(model, (x,)).module()
    elif way == 'fake':
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(x)
    elif way == 'inference':
        with torch.inference_mode():
            model(x)
    else:
        torch.vmap(lambda image: model(image[None])[0])(x)
    out = model(x)[0]
    assert type(out) is torch.Tensor, type(out)
    if way == 'export':
        torch.testing.assert_close(exported(x)[0], out, rtol=1e-4, atol=1e-4)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    (model(x)[0] * torch.randn(out.shape)).sum().backward()
    optimizer.step()
    for key, old, new in zip(dict(model.named_parameters()), before, model.parameters()):
        assert type(new.grad) is torch.Tensor, key
        assert not torch.equal(old, new), key
"""


@both
@pytest.mark.parametrize('way', ['export', 'fake'])
def test_nothing_stays_behind(name, way, request):
    """In a fresh process: trace, then use eagerly, then train; on maps of two sizes."""
    if way == 'export':
        request.getfixturevalue('dynamo')
    code = FRESH + f'for side in (64, 72): check({name!r}, side, {way!r})'
    command = [sys.executable, '-c', code]
    subprocess.run(command, check=True, timeout=300, cwd=Path(__file__).parent)


@both
@pytest.mark.parametrize('way', ['inference', 'vmap'])
def test_nothing_stays_behind_of_other_modes(name, way):
    scope = {}
    exec(FRESH, scope)
    scope['check'](name, 56, way)


@traced
@both
@pytest.mark.parametrize('strict', [False, True])
def test_export(name, strict):
    model = make(name, out_indices=(0, 1, 2, 3))
    exported = torch.export.export(model, (images(),), strict=strict).module()
    x = images().flip(0)
    for ours, theirs in zip(exported(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@traced
@both
def test_export_with_dynamic_height_and_width(name):
    """Multiples of 32 whose last map has more than one window; the error names what does not."""
    model = make(name)
    sides = (32 * torch.export.Dim(side, min=2, max=40) for side in ('rows', 'columns'))
    program = torch.export.export(
        model,
        (torch.randn(2, 3, 256, 320),),
        dynamic_shapes=(dict(zip((2, 3), sides, strict=True)),),
    )
    for size in ((288, 256), (512, 224)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(program.module()(x)[0], model(x)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match=r'Guard failed.*x\.size\(\)\[3\]'):
        program.module()(torch.randn(2, 3, 96, 96))


def through_onnxruntime(module: nn.Module, x: torch.Tensor, path: Path) -> list[np.ndarray]:
    torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


@traced
@both
def test_onnx(name, tmp_path):
    model = make(name, out_indices=(0, 1, 2, 3))
    found = through_onnxruntime(model, images(), tmp_path / 'swin.onnx')
    for ours, theirs in zip(found, model(images()), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


class Features(nn.Module):
    """Backbone and neck of a detector."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.detector.extract_feat(x)


@traced
@pytest.mark.parametrize('network', ['greenswin-tiny-w7', 'swinv2-tiny-w8'])
def test_onnx_of_mask_rcnns_backbone_and_neck(network, tmp_path):
    """Of the recipe, but for the sizes of the network."""
    recipe = CONFIGS / 'mask_rcnn' / f'mask-rcnn_greenmim-{network}_fpn_amp-1x_coco.py'
    config = Config.fromfile(recipe)
    config.model.backbone.update(arch=ARCH, init_cfg=None)
    config.model.neck.in_channels = [32, 64, 128, 256]
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = Features(randomised(DETECTORS.build(config.model))).eval()
    x = torch.randn(1, 3, 256, 352)
    found = through_onnxruntime(model, x, tmp_path / 'detector.onnx')
    expected = model(x)
    assert len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


@both
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_jit_trace(name):
    model = make(name)
    traced = torch.jit.trace(model, images())
    x = images().flip(0)
    torch.testing.assert_close(traced(x)[0], model(x)[0], rtol=1e-4, atol=1e-4)


@traced
@both
def test_compile_of_the_dense_use(name):
    """One graph in eval mode and in training, and the gradients of eager mode."""
    torch._dynamo.reset()
    model = make(name)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for mode in (False, True):
        model.train(mode)
        out, expected = run(compiled, 'dense'), run(model, 'dense')
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(out.square().sum(), parameters)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-4


# FLOP counters.


def counters():
    from fvcore.nn import FlopCountAnalysis
    from mmengine.analysis import get_model_complexity_info
    from torch.utils.flop_counter import FlopCounterMode

    def pytorch(model, x):
        with FlopCounterMode(display=False) as mode, torch.no_grad():
            model(x)
        return mode.get_total_flops()

    def mmengine(model, x):
        return get_model_complexity_info(model, inputs=(x,), show_table=False, show_arch=False)[
            'flops'
        ]

    def fvcore(model, x):
        analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False)
        return analysis.uncalled_modules_warnings(False).total()

    return dict(pytorch=pytorch, mmengine=mmengine, fvcore=fvcore)


def stock_swin(name: str) -> nn.Module:
    """The network of another library that :func:`green_swin` has the shapes of."""
    if name == 'v1':
        from mmdet.models.backbones import SwinTransformer

        stock = SwinTransformer(embed_dims=32, num_heads=(1, 2, 4, 8))
    else:
        from mmpretrain.models import SwinTransformerV2

        arch = dict(embed_dims=32, depths=[2, 2, 6, 2], num_heads=[1, 2, 4, 8])
        stock = SwinTransformerV2(
            dict(arch, extra_norm_every_n_blocks=0),
            window_size=7,
            pad_small_map=True,
            out_indices=(0, 1, 2, 3),
        )
    stock.eval()
    return stock


GREEN = dict(
    arch=dict(ARCH, depths=(2, 2, 6, 2)),
    window_size=7,
    pad_small_map=True,
    out_indices=(0, 1, 2, 3),
)


@pytest.mark.parametrize('counter', ['pytorch', 'mmengine', 'fvcore'])
@both
@pytest.mark.filterwarnings('ignore')
def test_flops_are_those_of_other_swins(name, counter):
    x = torch.randn(1, 3, 224, 224)
    count = counters()[counter]
    model = MODELS[name](**GREEN).eval()
    assert count(model, x) == pytest.approx(count(stock_swin(name), x), rel=0.02)


def run_tool(package: str, *args: str, cwd: Path) -> str:
    """Run ``get_flops.py`` as an installed OpenMMLab package brings it."""
    module = __import__(package)
    tool = Path(module.__file__).parent / '.mim' / 'tools' / 'analysis_tools' / 'get_flops.py'
    command = [sys.executable, str(tool), *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def printed_flops(out: str) -> float:
    printed = re.search(r'Flops: ([\d.]+)([MGT])', out)
    return float(printed[1]) * {'M': 1e6, 'G': 1e9, 'T': 1e12}[printed[2]]


@both
def test_get_flops_of_mmpretrain(name, tmp_path):
    backbone = f"dict(type='greenmim_mm.{MODELS[name].__name__}', **{GREEN})"
    config = f"model = dict(type='ImageClassifier', backbone={backbone})"
    (tmp_path / 'config.py').write_text(config)
    found = printed_flops(run_tool('mmpretrain', 'config.py', cwd=tmp_path))
    expected = counters()['mmengine'](stock_swin(name), torch.randn(1, 3, 224, 224))
    assert found == pytest.approx(expected, rel=0.02)


def test_get_flops_of_mmdet(tmp_path):
    """On an image of a data set in COCO's format, as the tool wants it.

    Of a size that windows divide: mmdet projects Swin's padding tokens one by one, we once.
    """
    import cv2
    from mmengine.fileio import dump

    cv2.imwrite(str(tmp_path / 'image.jpg'), np.zeros((112, 112, 3), dtype=np.uint8))
    dump(
        dict(
            images=[dict(id=1, file_name='image.jpg', height=112, width=112)],
            annotations=[
                dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 9, 9], area=81, iscrowd=0)
            ],
            categories=[dict(id=1, name='thing')],
        ),
        tmp_path / 'annotations.json',
    )
    config = """
_base_ = 'mmdet::rpn/rpn_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(_delete_=True, {}),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    metainfo=dict(classes=('thing',)), data_root='', ann_file='annotations.json',
    data_prefix=dict(img=''), pipeline=[
        dict(type='LoadImageFromFile'), dict(type='Resize', scale=(448, 448), keep_ratio=True),
        dict(type='PackDetInputs')]))
"""
    flops = []
    for backbone in (
        "type='SwinTransformer', embed_dims=32, num_heads=(1, 2, 4, 8)",
        *(f"type='greenmim_mm.{kind.__name__}', **{GREEN}" for kind in MODELS.values()),
    ):
        (tmp_path / 'config.py').write_text(config.format(backbone))
        flops.append(
            printed_flops(run_tool('mmdet', 'config.py', '--num-images', '1', cwd=tmp_path))
        )
    # mmdet has no Swin V2; its products are those of V1 but for the small position network.
    assert flops == pytest.approx([flops[0]] * 3, rel=0.02)


# torch.func, second derivatives, the meta device.


def scalar(model):
    buffers = dict(model.named_buffers())
    return lambda parameters, x: (
        torch.func.functional_call(model, (parameters, buffers), (x,))[-1].square().sum()
    )


def close(ours, theirs):
    for key, value in theirs.items():
        assert (ours[key] - value).norm() <= 1e-3 * value.norm() + 1e-5, key


@both
def test_func_grad_and_vmap(name):
    """Gradients, and gradients for each image of a batch."""
    model, x = make(name), images()
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    loss = scalar(model)
    loss(dict(model.named_parameters()), x).backward()
    expected = {key: p.grad for key, p in model.named_parameters()}
    close(torch.func.grad(loss)(parameters, x), expected)
    single = torch.func.grad(lambda parameters, image: loss(parameters, image[None]))
    each = torch.vmap(single, in_dims=(None, 0))(parameters, x)
    close({key: value.sum(0) for key, value in each.items()}, expected)
    out = torch.vmap(lambda image: model(image[None])[0][0])(x)
    torch.testing.assert_close(out, model(x)[0], rtol=1e-4, atol=1e-4)


@both
def test_func_in_the_masked_use(name):
    """With a plain tensor as the mask, which no transform is about."""
    model, x, hidden = make(name), images(), torch.from_numpy(mask().hidden.copy())
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    model(x, hidden).square().sum().backward()
    if not compiles_plans():  # torch 2.1 hides what the mask holds: one clear sentence
        with pytest.raises(ValueError, match='a transform hides the values of the mask'):
            torch.func.jvp(lambda x: model(x, hidden), (x,), (x,))
        return
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    found = torch.func.grad(
        lambda parameters: torch.func.functional_call(model, parameters, (x, hidden)).square().sum()
    )(parameters)
    close(found, expected)
    _, tangent = torch.func.jvp(lambda x: model(x, hidden), (x,), (x,))
    assert tangent.shape == model(x, hidden).shape and tangent.abs().sum() > 0


@both
def test_forward_mode(name):
    """Directional derivative against a difference quotient, in double precision."""
    model, x = make(name).double(), images().double()
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda x: model(x)[0], (x,), (direction,))
    step = 1e-5
    quotient = (model(x + step * direction)[0] - model(x - step * direction)[0]) / (2 * step)
    torch.testing.assert_close(tangent, quotient, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize('use', ['dense', 'masked'])
def test_gradient_penalty(name, use):
    """Gradients of the gradient's square, against layers called one by one."""

    def penalty(model):
        x = images(1).double().requires_grad_()
        (grad,) = torch.autograd.grad(run(model, use, x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(model.parameters()))

    lean = penalty(make(name).double())
    plain = make(name).double()
    for module in plain.modules():
        module.register_forward_hook(lambda *_: None)
        if hasattr(module, 'backend'):
            module.backend = 'math'
    for ours, theirs in zip(lean, penalty(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@both
def test_meta_device(name):
    model = make(name).to('meta')
    assert run(model, 'dense', images().to('meta')).shape == (2, 256, 3, 2)
    assert run(model, 'masked', images().to('meta')).shape == (2, 3, 256)
