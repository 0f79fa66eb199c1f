"""Activations over depth: what is measured, what is written, and what is refused."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from greenmim_mm.models import GreenSwin, GreenSwinV2

PATH = Path(__file__).resolve().parents[3] / 'tools/analysis/activations.py'


def load_tool():
    spec = importlib.util.spec_from_file_location('activations', PATH)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()
SMALL = tool.Settings(
    embed_dims=16,
    depths=(1, 2, 3, 1),
    num_heads=(1, 2, 4, 8),
    window_size=2,
    image_size=64,
    steps=3,
    batch_size=2,
    num_probe=2,
    warmup=1,
    mask_ratio=0.5,
)
ARCH = dict(embed_dims=16, depths=(1, 2, 3, 1), num_heads=(1, 2, 4, 8))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(folder / f'{index}.png')
    (folder / 'inner').mkdir()
    (folder / '4.png').rename(folder / 'inner/4.png')
    (folder / 'notes.txt').touch()
    return folder


@pytest.fixture(scope='module')
def report(folder):
    return tool.compare_activations(folder, SMALL)


@pytest.mark.parametrize('kind', [GreenSwin, GreenSwinV2])
def test_the_residual_stream_is_measured(kind):
    """Against a walk through the blocks by hand; the network is left as it was."""
    arch = ARCH | (dict(extra_norm_every_n_blocks=0) if kind is GreenSwinV2 else {})
    torch.manual_seed(0)
    backbone = kind(arch, window_size=2, drop_path_rate=0.5)
    backbone.init_weights()
    for block in backbone.blocks():
        torch.nn.init.normal_(block.norm2.weight)
    backbone.train()
    images = torch.randn(2, 3, 64, 64)
    found = tool.measure_activations(backbone, images)
    assert backbone.training and not any(p.grad is not None for p in backbone.parameters())
    assert not any(block._forward_hooks for block in backbone.blocks())
    assert found.stages == (0, 1, 1, 2, 2, 2, 3)

    backbone.eval()
    # All visible is dense: the masked use goes through the same blocks.
    streams = []
    for stage in backbone.stages:

        def walk(x, plans, stage=stage):
            for index, block in enumerate(stage.blocks):
                x = block(x, plans[index % 2])
                streams.append(x)
            return x

        stage.forward = walk
    with torch.no_grad():
        backbone(images, torch.zeros(4, dtype=torch.bool))
    assert len(streams) == len(found.largest) == 7
    for stream, largest, rms in zip(streams, found.largest, found.rms, strict=True):
        assert largest == pytest.approx(stream.abs().max().item(), rel=1e-4)
        assert rms == pytest.approx(stream.square().mean().sqrt().item(), rel=1e-4)


def test_both_networks_are_trained_and_measured(report):
    for name in ('V1', 'V2'):
        before, after = report.before[name], report.after[name]
        assert len(before.largest) == len(after.rms) == 7
        assert all(largest > rms > 0 for largest, rms in zip(after.largest, after.rms, strict=True))
        assert before.rms != after.rms
        assert len(report.losses[name]) == 3 and np.isfinite(report.losses[name]).all()


def test_blocks_of_v2_add_nothing_at_first(report):
    before = report.before['V2']
    for stage in range(4):
        inside = [v for s, v in zip(before.stages, before.largest, strict=True) if s == stage]
        assert len(set(inside)) == 1
    assert len(set(report.before['V1'].largest)) == 7


def test_same_settings_same_numbers(report, folder):
    again = tool.compare_activations(folder, SMALL)
    assert again == report


def test_report_is_written(report, tmp_path):
    tool.save_report(report, tmp_path / 'x.json')
    read = json.loads((tmp_path / 'x.json').read_text())
    assert read['settings']['depths'] == [1, 2, 3, 1]
    assert read['after']['V1']['largest'] == list(report.after['V1'].largest)
    tool.draw_report(report, tmp_path / 'x.png')
    picture = np.array(Image.open(tmp_path / 'x.png').convert('RGB'))
    assert picture.shape == (720, 1080, 3)
    for colour in ((255, 127, 14), (44, 160, 44)):  # both lines, in both columns
        drawn = (picture == colour).all(axis=-1)
        assert drawn[:, :540].sum() > 100 and drawn[:, 540:].sum() > 100
    for save, name in ((tool.save_report, 'x.json'), (tool.draw_report, 'x.png')):
        with pytest.raises(FileExistsError, match='--force'):
            save(report, tmp_path / name)
        save(report, tmp_path / name, force=True)


def test_images_are_normalised(tmp_path):
    Image.new('RGB', (64, 64), (124, 174, 46)).save(tmp_path / 'x.png')
    images = tool.load_images(tmp_path, 64, 1)
    assert images.shape == (1, 3, 64, 64)
    expected = torch.tensor([0.0055, 1.0105, -1.0027])
    torch.testing.assert_close(images[0, :, 5, 5], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('steps', 0, 'steps must be at least 1, got 0'),
        ('num_probe', -1, 'num_probe must be at least 1'),
        ('lr', 0.0, 'lr must be above 0, got 0.0'),
        ('lr', float('nan'), 'lr must be above 0, got nan'),
        ('seed', -1, 'seed must be at least 0'),
        ('image_size', 100, 'image_size must be a multiple of 32 .* got 100'),
        ('image_size', 32, 'at least 64, got 32'),
    ],
)
def test_settings_out_of_range(name, value, message):
    with pytest.raises(ValueError, match=message):
        tool.Settings(**{name: value})


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['IMAGES', '--num-probe=4'], 'has 5 images; 6 are needed'),
        (['IMAGES', '--window-size=8'], 'window_size=8 of stage 2 is larger than its map'),
        (['IMAGES', '--embed-dims=17'], 'cannot be split into 2 heads'),
        (['IMAGES', '--lr=-1'], 'lr must be above 0'),
        (['/nowhere'], 'folder /nowhere does not exist; make images with tools/make_demo_data.py'),
        (['IMAGES', '--out=x.jpg'], 'x.jpg must end in .png'),
    ],
)
def test_tool_ends_with_2_on_bad_input(folder, tmp_path, capsys, arguments, message):
    small = ['--image-size=64', '--window-size=2', '--batch-size=2', '--num-probe=2']
    arguments = [argument.replace('IMAGES', str(folder)) for argument in arguments]
    with pytest.raises(SystemExit) as exit_info:
        tool.main([arguments[0], f'--out={tmp_path}/x.png', *small, *arguments[1:]])
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.iterdir())


def test_tool_writes_both_files(folder, tmp_path, capsys):
    tool.main(
        [
            *(str(folder), f'--out={tmp_path}/x.png', '--steps=1', '--embed-dims=16'),
            *('--depths', '1', '1', '1', '1', '--num-heads', '1', '1', '2', '4'),
            *('--image-size=64', '--window-size=2', '--batch-size=2', '--num-probe=2'),
        ]
    )
    assert {path.name for path in tmp_path.iterdir()} == {'x.png', 'x.json'}
    assert 'wrote' in capsys.readouterr().out
