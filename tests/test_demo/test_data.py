import importlib.util
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
from greenmim_mm.demo.data import DemoDataConfig, build_demo_data

ROOT = Path(__file__).resolve().parents[2]
CONFIG = DemoDataConfig(image_size=96, num_unlabelled=12, num_train=16, num_val=12, seed=3)


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
    ):
        files = sorted(folder.iterdir())
        assert [file.suffix for file in files] == ['.jpg'] * count
        assert {cv2.imread(str(file)).shape for file in files} == {(96, 96, 3)}
        assert summary.num_images[part] == count
    assert summary.path == dst
    assert os.stat(dst).st_mode == os.stat(dst / 'coco').st_mode  # not private to its owner


@pytest.mark.parametrize('part', ['train', 'val'])
def test_annotations_agree_with_their_masks(built, part):
    dst, summary = built
    coco = COCO(dst / f'coco/annotations/instances_{part}.json')
    assert {c['id']: c['name'] for c in coco.cats.values()} == {i + 1: str(i) for i in range(10)}
    assert coco.dataset['info']['description'] and coco.dataset['licenses']
    assert len(coco.anns) == len(coco.dataset['annotations']) == summary.num_instances[part]

    pool = demo.load_digit_pools()[part]
    labels = dict(zip(pool.indices.tolist(), pool.labels.tolist(), strict=True))
    for image_id, image in coco.imgs.items():
        assert (dst / 'coco' / part / image['file_name']).is_file()
        annotations = coco.imgToAnns[image_id]
        assert 2 <= len(annotations) <= 6
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
    pools = demo.load_digit_pools()
    assert not set(pools['train'].indices) & set(pools['val'].indices)
    assert len(pools['train'].indices) + len(pools['val'].indices) == 1797
    assert not set(demo.PHOTOGRAPHS['train']) & set(demo.PHOTOGRAPHS['val'])

    # The files must obey, not only the tables.
    parts = json.loads((dst / 'meta.json').read_text())['parts']
    for name in ('photographs', 'digit_indices'):
        used = {part: set(parts[part][name]) for part in demo.PARTS}
        assert used['val'] and not used['val'] & (used['train'] | used['unlabelled'])
    for part in ('train', 'val'):
        coco = json.loads((dst / f'coco/annotations/instances_{part}.json').read_text())
        assert {image['photograph'] for image in coco['images']} == set(parts[part]['photographs'])
        used = {annotation['digit_index'] for annotation in coco['annotations']}
        assert used == set(parts[part]['digit_indices'])
        assert summary.photographs[part] == parts[part]['photographs']


def test_every_digit_and_photograph_may_be_drawn():
    for pool in demo.load_digit_pools().values():
        assert set(pool.labels.tolist()) == set(range(10))
    for names in demo.PHOTOGRAPHS.values():
        for photo in demo.load_photographs(names).values():
            assert photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[2] == 3


def test_photograph_that_is_not_installed_is_named():
    with pytest.raises(FileNotFoundError, match='nebula.png.*pip install'):
        demo.load_photographs(['nebula.png'])


def test_missing_digits_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match='pip install scikit-learn'):
        demo.load_digit_pools()


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


def test_masks_lie_where_the_image_shows_the_digit():
    pool = demo.load_digit_pools()['train']
    photo = demo.load_photographs(['grass.png'])['grass.png']
    for seed in range(10):
        image, instances = demo.compose_scene(np.random.default_rng(seed), pool, photo, 192)
        for instance in instances:
            # A digit has one colour, save for the soft pixel at its outline.
            inner = cv2.erode(instance.mask.astype(np.uint8), np.ones((5, 5))) > 0
            colour = np.median(image[instance.mask], axis=0)
            same = np.abs(image - colour).max(axis=-1) <= 2
            assert same[inner].mean() > 0.95
            outside = cv2.dilate(instance.mask.astype(np.uint8), np.ones((5, 5))) == 0
            assert same[outside].mean() < 0.01
        for position, upper in enumerate(instances):
            with_rim = cv2.dilate(upper.mask.astype(np.uint8), np.ones((3, 3))) > 0
            for lower in instances[:position]:
                assert not (lower.mask & with_rim).any()


def test_digits_contrast_with_their_surroundings():
    pool, photos = demo.load_digit_pools()['train'], demo.PHOTOGRAPHS['train']
    contrasts = []
    for seed, photo in enumerate(demo.load_photographs(photos).values()):
        image, instances = demo.compose_scene(np.random.default_rng(seed), pool, photo, 192)
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
        background = ~np.any([instance.mask for instance in instances], axis=0)
        for instance in instances:
            near = cv2.dilate(instance.mask.astype(np.uint8), np.ones((25, 25))) > 0
            around = lab[near & background].mean(axis=0)
            contrasts.append(np.linalg.norm(lab[instance.mask].mean(axis=0) - around))
    assert min(contrasts) > 20 and np.mean(contrasts) > 50  # 2 is about just noticeable


def test_earlier_digits_stay_visible(monkeypatch):
    pool = demo.load_digit_pools()['train']
    photo = demo.load_photographs(['coffee.png'])['coffee.png']
    areas = []
    render = demo.render_digit

    def spy(*args, **kwargs):
        opacity = render(*args, **kwargs)
        areas.append((opacity > 0.5).sum())
        return opacity

    monkeypatch.setattr(demo, 'render_digit', spy)
    shares = []
    for seed in range(40):
        areas.clear()
        _, instances = demo.compose_scene(np.random.default_rng(seed), pool, photo, 96)
        assert len(instances) == len(areas)  # none was left out in these scenes
        shares += [i.mask.sum() / area for i, area in zip(instances, areas, strict=True)]
    assert min(shares) >= demo.MIN_VISIBLE
    assert np.mean(np.array(shares) < 0.98) > 0.1  # occlusion does occur


@pytest.mark.parametrize('height', [14, 28, 72, 150])
@pytest.mark.parametrize('angle', [-15, 0, 15])
def test_rendered_digit_has_its_height_and_is_crisp(height, angle):
    pool = demo.load_digit_pools()['train']
    for glyph in pool.glyphs[:20]:
        opacity = demo.render_digit(glyph, height, angle, 1.0)
        assert opacity.dtype == np.float32 and 0 <= opacity.min() <= opacity.max() <= 1
        inside = opacity > 0.5
        assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        if angle == 0:
            assert abs(opacity.shape[0] - height) <= 1 + height / 64  # a pixel of the field
        edge = (opacity > 0.1) & (opacity < 0.9)
        outline = inside & (cv2.erode(inside.astype(np.uint8), np.ones((3, 3))) == 0)
        assert edge.sum() < 2.5 * outline.sum()


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
    assert message in capsys.readouterr().err.splitlines()[-1]


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
