"""k-NN: votes against a slow reference, the loops, and tools/knn.py from file to score."""

import importlib.util
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from greenmim_mm.checkpoint import convert_file
from greenmim_mm.evaluation import backbone_config, feature_config, knn_config, knn_scores
from greenmim_mm.evaluation import knn as knn_module
from greenmim_mm.evaluation.loops import _gathered
from greenmim_mm.models import GreenSwin, GreenSwinV2

ROOT = Path(__file__).resolve().parents[2]
ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))


def slow_scores(queries, bank, labels, num_classes, k, temperature):
    rows = []
    for query in queries.tolist():
        similarities = []
        for feature, label in zip(bank.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, feature, strict=True))
            similarities.append((dot / (math.hypot(*query) * math.hypot(*feature)), label))
        votes = [0.0] * num_classes
        for similarity, label in sorted(similarities, reverse=True)[:k]:
            votes[label] += math.exp(similarity / temperature)
        rows.append([vote / sum(votes) for vote in votes])
    return torch.tensor(rows, dtype=queries.dtype)


@pytest.mark.parametrize(('k', 'temperature'), [(1, 0.07), (20, 0.07), (20, 1.0), (40, 0.5)])
def test_votes(k, temperature):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(7, 5, generator=generator, dtype=torch.float64) * 3
    bank = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (40,), generator=generator)
    scores = knn_scores(queries, bank, labels, 4, k, temperature)
    torch.testing.assert_close(scores, slow_scores(queries, bank, labels, 4, k, temperature))


def test_votes_in_parts_of_the_memory_at_hand(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(9, 5, generator=generator), torch.randn(30, 5, generator=generator)
    labels = torch.arange(30) % 3
    whole = knn_scores(queries, bank, labels, 3)
    monkeypatch.setattr(knn_module, '_MAX_SIMILARITIES', 70)
    torch.testing.assert_close(knn_scores(queries, bank, labels, 3), whole)
    assert knn_scores(queries[:0], bank, labels, 3).shape == (0, 3)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(k=0), 'k=0 must lie between 1 and the 6 labelled images'),
        (dict(k=7), 'k=7 must lie between 1 and the 6'),
        (dict(temperature=0.0), 'temperature=0.0 must be positive'),
        (dict(num_classes=2), 'labels from 0 to 2 for 2 classes'),
    ],
)
def test_votes_refuse(change, message):
    settings = dict(num_classes=3, k=2) | change
    with pytest.raises(ValueError, match=message):
        knn_scores(torch.ones(1, 2), torch.ones(6, 2), torch.arange(6) % 3, **settings)


def test_features_of_all_processes_come_in_the_order_of_the_data(monkeypatch):
    """Seven images dealt to two processes: 0 2 4 6 and 1 3 5, with one of them repeated."""
    parts = [torch.tensor([0, 2, 4, 6]), torch.tensor([1, 3, 5, 0])]
    monkeypatch.setattr('greenmim_mm.evaluation.loops.all_gather', lambda local: parts)
    assert _gathered(parts[0], 7).tolist() == list(range(7))


@pytest.fixture(autouse=True)
def no_versions_of_compilers(monkeypatch):
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Three classes by brightness, eight images each to compare with and four to classify."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for part, count in (('train', 8), ('val', 4)):
        for label, level in enumerate((20, 120, 220)):
            folder = root / part / f'class {label}'
            folder.mkdir(parents=True)
            for number in range(count):
                image = (level + rng.integers(-8, 9, (64, 64, 3))).astype(np.uint8)
                assert cv2.imwrite(str(folder / f'{number}.png'), image)
    return root


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """As pre-training leaves it; and its backbone."""
    torch.manual_seed(0)
    backbone = GreenSwin(ARCH, window_size=2, img_size=64).eval()
    path = tmp_path_factory.mktemp('weights') / 'epoch_1.pth'
    weights = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    torch.save(dict(state_dict=weights), path)
    return path, backbone


def run(features: Config, images: Path, work_dir: Path, **settings) -> Runner:
    cfg = knn_config(
        features, images / 'train', images / 'val', work_dir, k=5, num_workers=0, **settings
    )
    runner = Runner.from_cfg(cfg)
    runner.model.init_weights()
    return runner


def test_loop_scores_what_the_features_say(images, checkpoint, tmp_path):
    """The loop against the same by hand: features, votes, share of right ones."""
    path, backbone = checkpoint
    runner = run(feature_config(path, backbone_config(path), 64), images, tmp_path, batch_size=5)
    scores = runner.test()

    def by_hand(part):
        features, labels = [], []
        for label in range(3):
            for file in sorted((images / part / f'class {label}').iterdir()):
                image = cv2.resize(cv2.imread(str(file)), (73, 73))[4:68, 4:68, ::-1].copy()
                x = torch.from_numpy(image).permute(2, 0, 1).float()
                mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
                std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
                with torch.no_grad():
                    features.append(backbone(((x - mean) / std)[None])[0].mean((2, 3))[0])
                labels.append(label)
        return torch.stack(features), torch.tensor(labels)

    bank, labels = by_hand('train')
    loop = runner.test_loop
    # Resized by other programs: the features agree, but for rounding of pixels.
    assert torch.cosine_similarity(loop.bank, bank).min() > 0.99
    assert loop.labels.tolist() == labels.tolist()
    queries, truth = by_hand('val')
    right = (slow_scores(queries, bank, labels, 3, 5, 0.07).argmax(1) == truth).float().mean()
    assert scores['accuracy/top1'] == pytest.approx(100 * right.item(), abs=9)
    # Brightness survives any network.
    assert scores['accuracy/top1'] > 60


def test_pretraining_is_watched_by_its_neighbours(images, tmp_path):
    """The loop between the epochs of GreenMIM's own pre-training, whose model has no classes."""
    cfg = knn_config(
        feature_config(None, dict(type='greenmim_mm.GreenSwin', arch=ARCH, window_size=2), 64),
        images / 'train',
        images / 'val',
        tmp_path,
        k=5,
        num_workers=0,
    )
    loop = cfg.pop('test_cfg')
    cfg.val_cfg = dict(loop, type='greenmim_mm.KNNValLoop')
    cfg.val_dataloader, cfg.val_evaluator = cfg.pop('test_dataloader'), cfg.pop('test_evaluator')
    cfg.model = dict(
        type='greenmim_mm.GreenMIM',
        backbone=dict(type='greenmim_mm.GreenSwin', arch=ARCH, window_size=2, img_size=64),
        neck=dict(
            type='greenmim_mm.GreenMIMPretrainDecoder',
            embed_dim=64,
            decoder_embed_dim=16,
            decoder_num_heads=2,
        ),
        head=dict(
            type='MAEPretrainHead',
            norm_pix=True,
            patch_size=32,
            loss=dict(type='PixelReconstructionLoss', criterion='L2'),
        ),
        data_preprocessor=dict(type='SelfSupDataPreprocessor', mean=[120.0] * 3, std=[60.0] * 3),
    )
    runner = Runner.from_cfg(cfg)
    assert runner.val()['accuracy/top1'] > 60


def test_classes_that_differ_are_named(images, checkpoint, tmp_path):
    other = tmp_path / 'val'
    for name in ('class 0', 'class 7'):
        (other / name).mkdir(parents=True)
        (other / name / '0.png').write_bytes((images / 'val/class 0/0.png').read_bytes())
    path, _ = checkpoint
    features = feature_config(path, backbone_config(path), 64)
    cfg = knn_config(features, images / 'train', other, tmp_path / 'logs', k=5, num_workers=0)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(ValueError, match='3 classes .* 2: .*class 1, class 2, class 7'):
        runner.test()


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('tool_knn', ROOT / 'tools/knn.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OPTIONS = ['--k', '5', '--img-size', '64', '--num-workers', '0']


def test_tool_takes_other_formats(tool, images, checkpoint, tmp_path, capsys):
    """The same score from mmengine's checkpoint and from its conversion to timm's names."""
    path, _ = checkpoint
    converted = tmp_path / 'timm.safetensors'
    convert_file(path, converted, 'timm')
    outputs = []
    for file in (path, converted):
        tool.main([str(file), str(images / 'train'), str(images / 'val'), *OPTIONS])
        outputs.append(capsys.readouterr().out.splitlines()[-1])
    assert outputs[0] == outputs[1] and outputs[0].startswith('accuracy/top1: ')


def test_tool_reads_swin_v2_and_its_windows(tmp_path):
    backbone = GreenSwinV2(
        dict(ARCH, extra_norm_every_n_blocks=0),
        window_size=2,
        img_size=64,
        pretrained_window_sizes=(3, 3, 3, 3),
    )
    torch.save(dict(state_dict=backbone.state_dict()), tmp_path / 'v2.pth')
    cfg = backbone_config(tmp_path / 'v2.pth')
    assert cfg['type'] == 'greenmim_mm.GreenSwinV2'
    assert tuple(cfg['window_size']) == (2, 2, 2, 2)
    assert tuple(cfg['pretrained_window_sizes']) == (3, 3, 3, 3)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({0: 'missing.pth'}, 'missing.pth'),
        ({1: 'nowhere'}, 'nowhere'),
        ({1: 'class 0'}, 'has no folder for each class'),
        ({4: '100'}, 'k=100 must lie between 1 and the 24 labelled images'),
    ],
)
def test_tool_refuses_in_one_line(tool, images, checkpoint, capsys, change, message):
    args = [str(checkpoint[0]), str(images / 'train'), str(images / 'val'), *OPTIONS]
    for place, value in change.items():
        args[place] = str(images / 'train' / value) if value == 'class 0' else value
    with pytest.raises(SystemExit) as exit_info:
        tool.main(args)
    assert exit_info.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'error: ' in line and message in line
