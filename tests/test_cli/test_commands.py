"""``greenmim export``, ``embed``, ``knn``, ``inspect``, and ``create_model``."""

import numpy as np
import pytest
import torch
from command_runs import command
from PIL import Image

import greenmim_mm
from greenmim_mm.checkpoint import convert_file
from greenmim_mm.evaluation import knn_scores
from greenmim_mm.models import GreenSwin, GreenSwinV2


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        command(*arguments)
    err = capsys.readouterr().err
    assert info.value.code == 2 and err.count('\n') == 1, err
    return err


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
    """Two classes that colour tells apart, six images each."""
    root = tmp_path_factory.mktemp('labelled')
    rng = np.random.default_rng(0)
    for name, base in (('red', (200, 40, 30)), ('blue', (20, 60, 190))):
        (root / name).mkdir()
        for number in range(6):
            pixels = np.clip(np.array(base) + rng.normal(0, 20, (70, 80, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f'{number}.png')
    return root


def test_embed_is_the_same_from_each_format(finished, photos, tmp_path, capsys):
    found = []
    for number, checkpoint in enumerate(
        (finished, finished / 'exported/timm.safetensors', finished / 'exported/huggingface')
    ):
        out = tmp_path / f'{number}.npz'
        command('embed', photos, '--checkpoint', checkpoint, '--out', out, '--workers', 0)
        found.append(np.load(out))
    assert '12 images, 128 features each' in capsys.readouterr().out
    assert [path.rpartition('/')[2] for path in found[0]['paths'][:2]] == ['a0.jpg', 'a1.jpg']
    assert found[0]['features'].dtype == np.float32 and found[0]['features'].std() > 1e-3
    for other in found[1:]:
        np.testing.assert_allclose(other['features'], found[0]['features'], atol=1e-5)


def test_embed_passes_bad_images_over(finished, photos, tmp_path):
    (tmp_path / 'bad.jpg').write_bytes(b'no image')
    features = greenmim_mm.embed([photos / 'a0.jpg', tmp_path], finished, workers=0)
    assert features.values.shape == (1, 128) and len(features.paths) == 1
    assert [*features.bad] == [str(tmp_path / 'bad.jpg')]
    with pytest.raises(ValueError, match='none is left'):
        greenmim_mm.embed(str(tmp_path), finished, workers=0)


def test_knn_leaves_one_out(finished, labelled, capsys):
    options = ('--k', 5, '--num-workers', 0)
    command('knn', finished, labelled, *options)
    assert capsys.readouterr().out.splitlines()[-1] == 'accuracy/top1: 100.00 %'
    command('knn', finished, labelled, labelled, *options)
    assert capsys.readouterr().out.splitlines()[-1] == 'accuracy/top1: 100.00 %'
    err = refused(capsys, 'knn', finished, labelled, '--k', 12, '--num-workers', 0)
    assert 'between 1 and the 11 other labelled images' in err


def test_leave_one_out_is_the_slow_one(monkeypatch):
    from greenmim_mm.evaluation import knn

    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(9, 4, generator=generator)
    labels = torch.arange(9) % 3
    monkeypatch.setattr(knn, '_MAX_SIMILARITIES', 20)  # two rows at a time
    found = knn_scores(bank, bank, labels, 3, 4, leave_one_out=True)
    for index in range(9):
        others = [other for other in range(9) if other != index]
        alone = knn_scores(bank[index : index + 1], bank[others], labels[others], 3, 4)
        torch.testing.assert_close(found[index : index + 1], alone)
    with pytest.raises(ValueError, match='between 1 and the 8 other'):
        knn_scores(bank, bank, labels, 3, 9, leave_one_out=True)
    with pytest.raises(ValueError, match='2 queries are not the 9'):
        knn_scores(bank[:2], bank, labels, 3, 4, leave_one_out=True)


def test_export_of_a_run_and_of_a_file(finished, tmp_path, capsys):
    command('export', finished, '--out', tmp_path / 'a', '--formats', 'timm,mmdet')
    assert 'timm.create_model(' in capsys.readouterr().out
    command('export', tmp_path / 'a/timm.safetensors', '--out', tmp_path / 'b', '--verify')
    names = {path.name for path in (tmp_path / 'b').iterdir()}
    assert {'mmdet.pth', 'timm.safetensors', 'huggingface', 'detectron2.pth'} <= names
    assert 'not empty' in refused(capsys, 'export', finished, '--out', tmp_path / 'b')
    (tmp_path / 'b/mine.txt').touch()
    err = refused(capsys, 'export', finished, '--out', tmp_path / 'b', '--force')
    assert 'holds other things, e.g. mine.txt' in err
    assert "'onnx' is unknown" in refused(
        capsys, 'export', finished, '--out', tmp_path / 'c', '--formats', 'onnx'
    )
    err = refused(capsys, 'export', tmp_path / 'none.pth', '--out', tmp_path / 'c')
    assert 'none.pth' in err and not (tmp_path / 'c').exists()


def test_inspect(finished, capsys):
    command('inspect', finished / 'exported/detectron2.pth')
    assert 'detectron2' in capsys.readouterr().out


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize(
    'target',
    ['mmdet', 'mmpretrain', 'timm', 'huggingface', 'torchvision', 'microsoft', 'detectron2'],
)
def test_create_model_finds_windows_and_sizes(tmp_path, target, version):
    if version == 2 and target in ('mmdet', 'detectron2'):
        target = 'greenmim_mm'  # these have no Swin V2
    torch.manual_seed(0)
    extra = dict(extra_norm_every_n_blocks=0) if version == 2 else {}
    arch = dict(embed_dims=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), **extra)
    kind = {1: GreenSwin, 2: GreenSwinV2}[version]
    model = kind(arch, window_size=3, img_size=96, drop_path_rate=0.0)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'own.pth')
    path = tmp_path / ('folder' if target == 'huggingface' else 'file.pth')
    convert_file(tmp_path / 'own.pth', path, target)
    found = greenmim_mm.create_model(checkpoint=path)
    assert type(found) is kind and tuple(found.window_sizes) == (3, 3, 3, 3)
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected = model.eval()(images)[0]
        torch.testing.assert_close(found.eval()(images)[0], expected, atol=1e-5, rtol=1e-5)


def test_create_model_refuses(tmp_path):
    model = greenmim_mm.create_model('swin-tiny', window_size=2)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'own.pth')
    with pytest.raises(ValueError, match='holds swin-tiny, not swin-base'):
        greenmim_mm.create_model('swin-base', checkpoint=tmp_path / 'own.pth')
    with pytest.raises(ValueError, match="'swin-x' does not exist; there are swin-tiny"):
        greenmim_mm.create_model('swin-x')
    with pytest.raises(ValueError, match='give the name of a model, a checkpoint, or both'):
        greenmim_mm.create_model()
    maps = greenmim_mm.create_model(checkpoint=tmp_path / 'own.pth', out_indices=(0, 3))(
        torch.rand(1, 3, 64, 64)
    )
    assert [tuple(value.shape) for value in maps] == [(1, 96, 16, 16), (1, 768, 2, 2)]
