import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from greenmim_mm.demo import data as demo
from greenmim_mm.demo import scenes
from greenmim_mm.demo.data import DemoDataConfig, build_demo_data

ROOT = Path(__file__).resolve().parents[2]
CONFIG = DemoDataConfig(
    image_size=96, num_unlabelled=16, num_train=20, num_val=16, seed=3, num_dev=12
)


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    dst = tmp_path_factory.mktemp('demo') / 'data'
    return dst, build_demo_data(dst, CONFIG)


def test_layout(built):
    dst, summary = built
    assert {path.name for path in dst.iterdir()} == {'unlabelled', 'coco', 'meta.json'}
    for part, folder, count in (
        ('unlabelled', dst / 'unlabelled', CONFIG.num_unlabelled),
        ('train', dst / 'coco/train', CONFIG.num_train),
        ('val', dst / 'coco/val', CONFIG.num_val),
        ('dev', dst / 'coco/dev', CONFIG.num_dev),
    ):
        files = sorted(folder.iterdir())
        assert [file.suffix for file in files] == ['.jpg'] * count
        assert {cv2.imread(str(file)).shape for file in files} == {(96, 96, 3)}
        assert summary.num_images[part] == count
    assert summary.path == dst
    assert os.stat(dst).st_mode == os.stat(dst / 'coco').st_mode  # not private to its owner


@pytest.mark.parametrize('part', ['train', 'val', 'dev'])
def test_annotations_agree_with_their_masks(built, part):
    dst, summary = built
    coco = COCO(dst / f'coco/annotations/instances_{part}.json')
    assert {c['id']: c['name'] for c in coco.cats.values()} == {i + 1: str(i) for i in range(10)}
    assert coco.dataset['info']['description'] and coco.dataset['licenses']
    assert len(coco.anns) == len(coco.dataset['annotations']) == summary.num_instances[part]

    pool = scenes.load_digit_pools()[part]
    labels = dict(zip(pool.indices.tolist(), pool.labels.tolist(), strict=True))
    for image_id, image in coco.imgs.items():
        assert (dst / 'coco' / part / image['file_name']).is_file()
        annotations = coco.imgToAnns[image_id]
        assert 1 <= len(annotations) <= 3
        claimed = np.zeros((image['height'], image['width']), int)
        for annotation in annotations:
            segmentation = annotation['segmentation']
            assert isinstance(segmentation['counts'], str)
            mask = coco_mask.decode(segmentation)
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert annotation['bbox'] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
            assert annotation['area'] == mask.sum() > 0
            assert annotation['iscrowd'] == 0
            assert annotation['category_id'] == labels[annotation['digit_index']] + 1
            claimed += mask
        assert claimed.max() == 1  # a pixel belongs to the digit on top alone


def test_splits_share_no_digit_and_no_photograph(built):
    dst, summary = built
    pools = scenes.load_digit_pools()
    assert sum(len(pool.indices) for pool in pools.values()) == 1797
    for one, other in itertools.combinations(pools, 2):
        assert not set(pools[one].indices) & set(pools[other].indices)
        assert not set(scenes.PHOTOGRAPHS[one]) & set(scenes.PHOTOGRAPHS[other])

    # The files must obey, not only the tables.
    parts = json.loads((dst / 'meta.json').read_text())['parts']
    for name in ('photographs', 'digit_indices'):
        used = {part: set(parts[part][name]) for part in demo.PARTS}
        assert used['val'] and not used['val'] & (used['train'] | used['unlabelled'])
        assert used['dev'] and not used['dev'] & (used['train'] | used['unlabelled'] | used['val'])
    for part in ('train', 'val', 'dev'):
        coco = json.loads((dst / f'coco/annotations/instances_{part}.json').read_text())
        assert {image['photograph'] for image in coco['images']} == set(parts[part]['photographs'])
        used = {annotation['digit_index'] for annotation in coco['annotations']}
        assert used == set(parts[part]['digit_indices'])
        assert summary.photographs[part] == parts[part]['photographs']


def test_part_for_choices_is_left_out_unless_asked_for(tmp_path):
    summary = build_demo_data(tmp_path / 'data', DemoDataConfig(96, 1, 1, 1))
    assert set(summary.num_images) == {'unlabelled', 'train', 'val'}
    assert not (tmp_path / 'data/coco/dev').exists()


def test_same_seed_same_bytes(built, tmp_path):
    dst, _ = built
    build_demo_data(tmp_path / 'again', CONFIG)
    assert contents(tmp_path / 'again') == contents(dst)


def test_other_seed_other_images(built, tmp_path):
    dst, _ = built
    build_demo_data(tmp_path / 'other', replace(CONFIG, seed=4))
    first, second = contents(dst), contents(tmp_path / 'other')
    assert first.keys() == second.keys()
    assert not [name for name in first if first[name] == second[name]]


def test_a_part_does_not_depend_on_how_many_images_are_built(built, tmp_path):
    dst, _ = built
    build_demo_data(tmp_path / 'new', replace(CONFIG, num_unlabelled=3, num_val=5))
    first, second = contents(dst), contents(tmp_path / 'new')
    assert {n for n in first if 'train' in n} == {n for n in second if 'train' in n}
    differing = {name for name in second if first[name] != second[name]}
    assert differing == {'coco/annotations/instances_val.json', 'meta.json'}


def test_parts_differ_although_they_draw_from_the_same_digits(built):
    dst, _ = built
    names = [f'{index + 1:06d}.jpg' for index in range(CONFIG.num_unlabelled)]
    for name in names:
        assert (dst / 'unlabelled' / name).read_bytes() != (dst / 'coco/train' / name).read_bytes()


def test_existing_destination_is_refused_and_kept(built):
    dst, _ = built
    before = contents(dst)
    with pytest.raises(FileExistsError, match='another path, remove it'):
        build_demo_data(dst, CONFIG)
    assert contents(dst) == before


def test_overwrite_replaces_an_earlier_build_only(tmp_path):
    small = DemoDataConfig(image_size=96, num_unlabelled=1, num_train=1, num_val=1)
    dst = tmp_path / 'parents' / 'made' / 'data'
    build_demo_data(dst, small)
    (dst / 'stale.txt').touch()
    build_demo_data(dst, small, overwrite=True)
    assert not (dst / 'stale.txt').exists()
    assert [path.name for path in dst.parent.iterdir()] == ['data']

    precious = tmp_path / 'home'
    precious.mkdir()
    (precious / 'thesis.txt').touch()
    with pytest.raises(FileExistsError, match='no demo data'):
        build_demo_data(precious, small, overwrite=True)
    assert (precious / 'thesis.txt').exists()


@pytest.mark.parametrize('overwrite', [False, True])
def test_failure_midway_leaves_nothing_behind(tmp_path, monkeypatch, overwrite):
    small = DemoDataConfig(image_size=96, num_unlabelled=2, num_train=2, num_val=2)
    if overwrite:
        build_demo_data(tmp_path / 'data', small)
    before = contents(tmp_path)
    compose, calls = demo.compose_scene, []

    def fail_later(*args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError('power cut')
        return compose(*args)

    monkeypatch.setattr(demo, 'compose_scene', fail_later)
    with pytest.raises(RuntimeError, match='power cut'):
        build_demo_data(tmp_path / 'data', small, overwrite=overwrite)
    assert len(calls) == 4
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == overwrite


def test_failed_swap_restores_the_earlier_build(tmp_path, monkeypatch):
    small = DemoDataConfig(image_size=96, num_unlabelled=1, num_train=1, num_val=1)
    dst = tmp_path / 'data'
    build_demo_data(dst, small)
    before = contents(dst)
    rename = os.rename

    def refuse_new(source, target):
        if Path(source).name == 'new':
            raise OSError('no space left')
        rename(source, target)

    monkeypatch.setattr(demo.os, 'rename', refuse_new)
    with pytest.raises(OSError, match='no space left'):
        build_demo_data(dst, replace(small, seed=1), overwrite=True)
    assert contents(dst) == before
    assert [path.name for path in tmp_path.iterdir()] == ['data']


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('image_size', 0, r'image_size must be a multiple of 32.*got 0; use'),
        ('image_size', -192, r'image_size .*got -192; use'),
        ('image_size', 64, r'image_size .*at least 96, got 64; use for example 96'),
        ('image_size', 200, r'image_size .*got 200; use for example 192'),
        ('num_unlabelled', 0, r'num_unlabelled must be at least 1, got 0; ask'),
        ('num_train', -1, r'num_train must be at least 1, got -1; ask'),
        ('num_val', 0, r'num_val must be at least 1, got 0; ask'),
        ('num_dev', -1, r'num_dev must be at least 0, got -1; use'),
        ('seed', -1, r'seed must be at least 0, got -1; use'),
    ],
)
def test_config_out_of_range(name, value, message):
    with pytest.raises(ValueError, match=message):
        DemoDataConfig(**{name: value})


@pytest.mark.parametrize('value', [192.0, '192', None, True])
def test_config_of_wrong_type(value):
    with pytest.raises(TypeError, match='image_size must be an int, got'):
        DemoDataConfig(image_size=value)


def load_tool():
    spec = importlib.util.spec_from_file_location('tool', ROOT / 'tools' / 'make_demo_data.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


SMALL = ['--image-size=96', '--num-unlabelled=1', '--num-train=1', '--num-val=1', '--seed=2']


def test_tool_builds_what_the_library_builds(tmp_path):
    tool = load_tool()
    tool.main([str(tmp_path / 'tool'), *SMALL])
    build_demo_data(tmp_path / 'library', DemoDataConfig(96, 1, 1, 1, 2))
    assert contents(tmp_path / 'tool') == contents(tmp_path / 'library')
    tool.main([str(tmp_path / 'tool'), *SMALL, '--overwrite'])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['DST', '--image-size', '100'], 'image_size must be a multiple of 32'),
        (['DST', '--num-val', '0'], 'num_val must be at least 1, got 0'),
        (['DST', '--seed', 'one'], 'invalid int value'),
        ([], 'DST'),
        (['EXISTING', *SMALL], 'exists; give another path'),
        (['EXISTING/file/below', *SMALL], 'file'),
    ],
)
def test_tool_ends_with_2_on_bad_input(tmp_path, capsys, arguments, message):
    (tmp_path / 'EXISTING').mkdir()
    (tmp_path / 'EXISTING' / 'file').touch()
    if arguments:
        arguments = [str(tmp_path / arguments[0]), *arguments[1:]]
    with pytest.raises(SystemExit) as exit_:
        load_tool().main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_tool_as_a_program(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'make_demo_data.py', tmp_path, '--num-train=0'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert 'num_train must be at least 1' in result.stderr
    assert 'Traceback' not in result.stderr
