"""Conversion of files: what is written, under which suffix, with which note."""

import hashlib
import json

import pytest
import timm
import torch
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from mmengine.config import ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from tiny_swins import ARCH, green_swin, pretrained_file, pretrained_weights, randomised
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin
from transformers import SwinForImageClassification, SwinModel, Swinv2Model

from greenmim_mm.checkpoint import (
    CheckpointError,
    LossError,
    convert_file,
    convert_state_dict,
    load_checkpoint,
    save_checkpoint,
)
from greenmim_mm.checkpoint.notes import CHECKSUMS, make_checksums
from greenmim_mm.verification import verify_network
from greenmim_mm.version import __version__

LICENCE = 'weights published by the GreenMIM authors are CC BY-NC 4.0'


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value, second[key]), key


def test_note_and_left_out(tmp_path):
    weights = pretrained_weights()
    authors = convert_state_dict(weights, 'greenmim_mm', 'greenmim')
    src, dst = tmp_path / 'authors.pth', tmp_path / 'swin.pth'
    torch.save({'model': authors, 'optimizer': {}, 'epoch': 3}, src)
    result = convert_file(src, dst, 'mmpretrain')
    written = torch.load(dst, weights_only=True)
    assert written.keys() == {'meta', 'state_dict'}
    assert written['meta'].pop(CHECKSUMS) == make_checksums(written['state_dict'])
    assert (
        written['meta']
        == result.meta
        == dict(
            source_file='authors.pth',
            source_sha256=hashlib.sha256(src.read_bytes()).hexdigest(),
            source_format='greenmim',
            format='mmpretrain',
            greenmim_mm_version=__version__,
            licence=LICENCE,
            window_sizes='2,2,2,2',
        )
    )
    expected = {k: v for k, v in weights.items() if k.startswith('backbone.')}
    assert_equal(written['state_dict'], expected)
    assert (result.report.source, result.report.target) == ('greenmim', 'mmpretrain')
    assert result.report.left_out == ('optimizer', 'epoch')
    assert result.path == dst and result.verification is None
    # And on to a file as the authors write it.
    convert_file(dst, tmp_path / 'back.pth', 'greenmim', 'mmpretrain')
    assert torch.load(tmp_path / 'back.pth', weights_only=True).keys() == {'meta', 'model'}


def test_licence_survives_every_form(tmp_path):
    src = tmp_path / 'authors.pth'
    torch.save({'model': convert_state_dict(pretrained_weights(), 'auto', 'greenmim')}, src)
    steps = [
        ('a.safetensors', 'timm'),
        ('b', 'huggingface'),
        ('c.pth', 'torchvision'),
        ('d.bin', 'mmdet'),
    ]
    for name, target in steps:
        assert convert_file(src, tmp_path / name, target).meta['licence'] == LICENCE
        src = tmp_path / name
        assert load_checkpoint(src).meta['licence'] == LICENCE
        assert load_checkpoint(src).meta['format'] == target
    # transformers drops the metadata of the weights when it saves, and keeps the config.
    SwinModel.from_pretrained(tmp_path / 'b').save_pretrained(tmp_path / 'saved')
    result = convert_file(tmp_path / 'saved', tmp_path / 'e.pth', 'mmdet')
    assert result.meta['licence'] == LICENCE


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin', '.safetensors'])
@pytest.mark.parametrize('target', ['mmdet', 'timm', 'torchvision', 'detectron2'])
def test_suffixes(tmp_path, suffix, target):
    src, dst = pretrained_file(tmp_path), tmp_path / f'x{suffix}'
    convert_file(src, dst, target)
    assert (dst.read_bytes()[:2] == b'PK') == (suffix != '.safetensors')
    expected = convert_state_dict(pretrained_weights(), 'greenmim_mm', target)
    read = load_checkpoint(dst, mmap=True)
    assert_equal(read.state_dict, expected)
    assert read.meta['source_file'] == src.name
    if suffix == '.safetensors':
        with safe_open(dst, framework='pt') as file:
            assert file.metadata()['format'] == 'pt'
            assert file.metadata()['checkpoint_format'] == target
    convert_file(dst, tmp_path / 'back.pth', 'mmdet')
    back = load_checkpoint(tmp_path / 'back.pth').state_dict
    weights = pretrained_weights()
    assert_equal(back, {k: v for k, v in weights.items() if k.startswith('backbone.')})


@pytest.mark.parametrize('head', [True, False])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_timm_opens_it(tmp_path, monkeypatch, head, suffix):
    """By the way that users of timm go, with a variant small enough for a test."""
    size = dict(embed_dim=8, depths=(2, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=2)
    original = randomised(TimmSwin(img_size=64, num_classes=5 if head else 0, **size)).eval()
    torch.save(original.state_dict(), tmp_path / 'timm.pth')
    convert_file(tmp_path / 'timm.pth', tmp_path / 'ms.pth', 'microsoft')
    convert_file(tmp_path / 'ms.pth', tmp_path / f'x{suffix}', 'timm')
    model = timm.create_model(
        'swin_tiny_patch4_window7_224',
        pretrained=False,
        checkpoint_path=str(tmp_path / f'x{suffix}'),
        num_classes=5 if head else 0,
        img_size=64,
        **size,
    ).eval()
    assert_equal(model.state_dict(), original.state_dict())


def test_torchvision_opens_it(tmp_path):
    torch.manual_seed(0)
    arguments = dict(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[2, 1, 2, 1],
        num_heads=[1, 2, 2, 4],
        window_size=[2, 2],
        num_classes=5,
    )
    original = randomised(TorchvisionSwin(**arguments))
    torch.save(original.state_dict(), tmp_path / 'tv.pth')
    convert_file(tmp_path / 'tv.pth', tmp_path / 'timm.pth', 'timm')
    convert_file(tmp_path / 'timm.pth', tmp_path / 'x.pth', 'torchvision')
    model = TorchvisionSwin(**arguments)
    model.load_state_dict(torch.load(tmp_path / 'x.pth', weights_only=True))
    assert_equal(model.state_dict(), original.state_dict())


@pytest.mark.parametrize('version', [1, 2])
def test_transformers_opens_it(tmp_path, version):
    src = pretrained_file(tmp_path, version=version)
    convert_file(src, tmp_path / 'hf', 'huggingface')
    assert {path.name for path in (tmp_path / 'hf').iterdir()} == {
        'config.json',
        'model.safetensors',
    }
    kind = SwinModel if version == 1 else Swinv2Model
    model, info = kind.from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.window_size == 2 and model.config.image_size == 64
    assert model(torch.rand(1, 3, 64, 64)).last_hidden_state.shape == (1, 4, 64)
    back = tmp_path / 'back.pth'
    convert_file(tmp_path / 'hf', back, 'mmpretrain')
    weights = pretrained_weights(version)
    expected = {k: v for k, v in weights.items() if k.startswith('backbone.')}
    found = load_checkpoint(back).state_dict
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6 if 'coords' in key else 0)


def test_classifier_for_transformers(tmp_path):
    weights = pretrained_weights()
    state_dict = {k: v for k, v in weights.items() if k.startswith('backbone.')}
    state_dict |= {'head.fc.weight': torch.rand(7, 64), 'head.fc.bias': torch.rand(7)}
    torch.save({'state_dict': state_dict}, tmp_path / 'cls.pth')
    convert_file(tmp_path / 'cls.pth', tmp_path / 'hf', 'huggingface', dtype='fp16')
    model, info = SwinForImageClassification.from_pretrained(
        tmp_path / 'hf', output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.num_labels == 7
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert config['architectures'] == ['SwinForImageClassification']
    assert config['torch_dtype'] == 'float16'
    # Settings that do not follow from the parameters are kept.
    config |= dict(hidden_dropout_prob=0.3, id2label={str(i): f'c{i}' for i in range(7)})
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config))
    convert_file(tmp_path / 'hf', tmp_path / 'again', 'huggingface')
    again = json.loads((tmp_path / 'again' / 'config.json').read_text())
    assert again['hidden_dropout_prob'] == 0.3 and again['id2label']['3'] == 'c3'


def test_detectron2_keys_are_exact(tmp_path):
    """Its checkpointer takes 'model' as it is unless told to match by heuristics."""
    convert_file(pretrained_file(tmp_path), tmp_path / 'd2.pth', 'detectron2')
    content = torch.load(tmp_path / 'd2.pth', weights_only=True)
    assert content.keys() == {'model', 'meta'}
    assert 'backbone.bottom_up.layers.0.blocks.1.attn.qkv.weight' in content['model']
    assert 'backbone.bottom_up.norm3.bias' in content['model']


@pytest.mark.parametrize('dtype', ['fp16', 'bf16', 'fp32'])
def test_dtypes(tmp_path, dtype):
    kind = dict(fp16=torch.float16, bf16=torch.bfloat16, fp32=torch.float32)[dtype]
    weights = pretrained_weights()
    convert_file(pretrained_file(tmp_path), tmp_path / 'x.safetensors', 'mmdet', dtype=dtype)
    for key, value in load_checkpoint(tmp_path / 'x.safetensors').state_dict.items():
        expected = weights[key].to(kind) if weights[key].is_floating_point() else weights[key]
        assert value.dtype == expected.dtype and torch.equal(value, expected)


def test_numbers_too_large_for_the_dtype(tmp_path):
    weights = pretrained_weights()
    weights['backbone.norm3.bias'][3] = 1e6
    torch.save({'state_dict': weights}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'does not fit into fp16: backbone\.norm3\.bias'):
        convert_file(tmp_path / 'x.pth', tmp_path / 'y.pth', 'mmdet', dtype='fp16')


@pytest.mark.parametrize('old, new', [(6, 7), (7, 12)])
def test_windows_into_mmdet(tmp_path, old, new):
    """Smooth tables, as trained ones are: resized, they must give nearly the same features."""
    source = green_swin(window_size=old, out_indices=(0, 1, 2, 3), pad_small_map=True)
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, 2 * old - 1)] * 2, indexing='ij')
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith('bias_table'):
                smooth = (2 * rows).cos() * columns.cos()
                parameter.copy_(smooth.flatten()[:, None].expand_as(parameter))
            elif 'norm' not in name:
                parameter.mul_(0.3)
    state_dict = {'backbone.' + key: value for key, value in source.state_dict().items()}
    torch.save({'state_dict': state_dict}, tmp_path / 'src.pth')
    result = convert_file(tmp_path / 'src.pth', tmp_path / 'x.pth', 'mmdet', window_size=new)
    assert f'transformed 6 (window {old} to {new} resized)' in result.report.summary()
    written = torch.load(tmp_path / 'x.pth', weights_only=True)['state_dict']
    index = written['backbone.stages.0.blocks.0.attn.w_msa.relative_position_index']
    assert index.shape == (new**2, new**2)
    size = dict(embed_dims=8, depths=(2, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=new)
    strict, initialised = (
        MMDetSwin(
            **size,
            init_cfg=ConfigDict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')),
        )
        for _ in range(2)
    )
    strict.load_state_dict({k.removeprefix('backbone.'): v for k, v in written.items()})
    initialised.init_weights()
    assert_equal(strict.state_dict(), initialised.state_dict())
    images = torch.rand(1, 3, 32 * old, 32 * old)
    source.eval(), strict.eval()
    with torch.no_grad():
        for before, after in zip(source(images), strict(images), strict=True):
            assert after.isfinite().all()
            similar = torch.cosine_similarity(before.flatten(), after.flatten(), dim=0)
            assert similar > 0.95, similar


def test_losses_are_refused_or_told(tmp_path):
    weights = pretrained_weights() | {'backbone.novel.weight': torch.ones(2)}
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    torch.save({'state_dict': weights}, src)
    with pytest.raises(LossError, match=r'1 learned.*backbone\.novel\.weight.*--no-strict'):
        convert_file(src, dst, 'mmdet')
    assert not dst.exists()
    report = convert_file(src, dst, 'mmdet', strict=False).report
    assert not report.lossless and report.lost == ['backbone.novel.weight']
    assert 'backbone.novel.weight' not in load_checkpoint(dst).state_dict


def test_buffers_of_an_unknown_window(tmp_path):
    src = tmp_path / 'timm.pth'
    torch.save(convert_state_dict(pretrained_weights(2), 'greenmim_mm', 'timm'), src)
    for target in ('torchvision', 'mmpretrain'):
        with pytest.raises(LossError, match='does not tell its window size.*--window-size'):
            convert_file(src, tmp_path / 'x.pth', target)
    windows = dict(window_size=2, pretrained_window_size=2)
    convert_file(src, tmp_path / 'x.pth', 'torchvision', verify=verify_network, **windows)
    for strict, message in ((True, 'does not tell'), (False, r'config\.json needs it')):
        with pytest.raises(CheckpointError, match=f'{message}.*--window-size'):
            convert_file(src, tmp_path / 'hf', 'huggingface', strict=strict)


def test_pretraining_windows_of_transformers_v2(tmp_path):
    """Scales of V2's offsets that only config.json knows reach the buffers of other libraries."""
    src = pretrained_file(tmp_path, version=2)
    convert_file(src, tmp_path / 'hf', 'huggingface', window_size=4, verify=verify_network)
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert config['pretrained_window_sizes'] == [2, 2, 2, 2]
    for target in ('torchvision', 'mmpretrain'):
        result = convert_file(
            tmp_path / 'hf', tmp_path / f'{target}.pth', target, verify=verify_network
        )
        assert result.architecture.pretrained_window_sizes == (2, 2, 2, 2)


def test_force_replaces(tmp_path):
    src = pretrained_file(tmp_path)
    for name, target in (('x.pth', 'mmdet'), ('x.safetensors', 'timm'), ('hf', 'huggingface')):
        dst = tmp_path / name
        convert_file(src, dst, target)
        with pytest.raises(FileExistsError, match='--force'):
            convert_file(src, dst, target)
        convert_file(src, dst, target, force=True, dtype='fp16')
        values = load_checkpoint(dst).state_dict.values()
        assert {v.dtype for v in values if v.is_floating_point()} == {torch.float16}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {src.name, 'x.pth', 'x.safetensors', 'hf'}


def test_source_is_never_replaced(tmp_path):
    src = pretrained_file(tmp_path)
    before = src.read_bytes()
    with pytest.raises(FileExistsError, match='is the source itself'):
        convert_file(src, src, 'mmdet', force=True)
    assert src.read_bytes() == before
    convert_file(src, tmp_path / 'hf', 'huggingface')
    with pytest.raises(FileExistsError, match='is the source itself'):
        convert_file(tmp_path / 'hf', tmp_path / 'hf', 'huggingface', force=True)


def test_folder_with_other_things_is_left_alone(tmp_path):
    src = pretrained_file(tmp_path)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.tex').write_text('precious')
    with pytest.raises(FileExistsError, match=r'holds other things, e\.g\. thesis\.tex'):
        convert_file(src, tmp_path / 'mine', 'huggingface', force=True)
    assert (tmp_path / 'mine' / 'thesis.tex').read_text() == 'precious'


def test_save_and_load(tmp_path):
    state_dict = {'a.weight': torch.rand(2, 3), 'b': torch.arange(3)}
    for name in ('x.pth', 'y.safetensors'):
        save_checkpoint(state_dict, tmp_path / name, 'mmdet', dict(epoch=3, note='mine'))
        found = load_checkpoint(tmp_path / name)
        assert_equal(found.state_dict, state_dict)
        assert found.meta['note'] == 'mine' and int(found.meta['epoch']) == 3
        assert found.meta['format'] == 'mmdet'
        with pytest.raises(FileExistsError):
            save_checkpoint(state_dict, tmp_path / name, 'mmdet')
    # Tensors that share memory or are not contiguous.
    shared = {'a': state_dict['a.weight'], 'b': state_dict['a.weight'].t()}
    save_checkpoint(shared, tmp_path / 'z.safetensors', 'mmdet')
    assert_equal(load_checkpoint(tmp_path / 'z.safetensors').state_dict, shared)


def test_plain_safetensors_of_others(tmp_path):
    weights = convert_state_dict(pretrained_weights(), 'greenmim_mm', 'timm')
    save_file(weights, tmp_path / 'timm.safetensors')
    result = convert_file(tmp_path / 'timm.safetensors', tmp_path / 'x.pth', 'mmdet')
    assert result.report.source == 'timm' and result.architecture.embed_dims == ARCH['embed_dims']
