"""Images without labels: what is found, what is passed over, and draws that repeat."""

import os
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATASETS
from PIL import Image
from torch.utils.data import DataLoader

import greenmim_mm
from greenmim_mm.datasets import (
    BadImages,
    DataError,
    Draw,
    RepeatableSampler,
    UnlabelledImages,
    UnreadableImageError,
    check_dataset,
    find_images,
    seeded,
)
from greenmim_mm.registry import DATASETS as OUR_DATASETS


def draw_and_tell(results: dict) -> dict:
    """A pipeline that draws from all three generators."""
    if os.path.getsize(results['img_path']) == 0:
        random.random()
        raise UnreadableImageError(f'image {results["img_path"]} cannot be read')
    return dict(
        path=results['img_path'],
        draws=torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]),
    )


@pytest.fixture
def folder(tmp_path):
    """Twelve images, named a to l."""
    root = tmp_path / 'images'
    root.mkdir()
    for name in 'abcdefghijkl':
        Image.new('RGB', (8, 8), (ord(name), 0, 0)).save(root / f'{name}.png')
    return root


def dataset_of(folder, **kwargs):
    return UnlabelledImages(str(folder), pipeline=[draw_and_tell], **kwargs)


def batches(dataset, epoch, num_workers, seed=7, start=0):
    sampler = RepeatableSampler(dataset, seed=seed)
    sampler.set_epoch(epoch)
    sampler.start_at(start)
    loader = DataLoader(dataset, 2, sampler=sampler, num_workers=num_workers)
    return [(batch['path'], batch['draws'].tolist()) for batch in loader]


def test_it_is_registered_and_exported():
    assert OUR_DATASETS.get('UnlabelledImages') is greenmim_mm.UnlabelledImages is UnlabelledImages
    with pytest.raises(AttributeError, match='Nobody'):
        _ = greenmim_mm.Nobody


def test_built_from_a_config(folder):
    pipeline = [dict(type='greenmim_mm.LoadImageFromFile')]
    config = dict(
        type='greenmim_mm.UnlabelledImages',
        data_root=str(folder.parent),
        data_prefix='images',
        pipeline=pipeline,
    )
    dataset = DATASETS.build(config)
    assert len(dataset) == 12
    assert dataset[3]['img'][0, 0].tolist() == [0, 0, ord('d')]
    check_dataset(config)


def test_what_is_found(tmp_path):
    (tmp_path / 'b' / 'deep' / 'deeper').mkdir(parents=True)
    (tmp_path / '.hidden').mkdir()
    wanted = ['a.JPG', 'z.jpeg', 'b/1.Png', 'b/2.webp', 'b/deep/3.bmp', 'b/deep/deeper/4.TIF']
    wanted += ['b/deep/deeper/5.tiff']
    others = ['notes.md', '.hidden/6.png', '._a.JPG', 'b/movie.mp4']
    for name in wanted + others:
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / 'pipe.png')  # reading it would wait for ever
    (tmp_path / 'b' / 'loop').symlink_to(tmp_path)
    (tmp_path / 'b' / 'twice').symlink_to(tmp_path / 'b' / 'deep')
    (tmp_path / 'self.png').symlink_to(tmp_path / 'self.png')
    (tmp_path / 'lost.png').symlink_to(tmp_path / 'nowhere.png')
    found = list(find_images(str(tmp_path)))
    assert found == list(find_images(str(tmp_path)))
    assert {os.path.relpath(path, tmp_path) for path in found} == set(wanted)
    assert len(found) == len(wanted)


def test_files_and_lists(folder, tmp_path):
    listing = tmp_path / 'list.txt'
    listing.write_text(f'images/b.png\n\n{folder}/c.png \nimages/missing.png\n')
    found = list(find_images([str(folder / 'a.png'), str(listing)]))
    assert found[0] == str(folder / 'a.png')
    assert [os.path.basename(path) for path in found[1:]] == ['b.png', 'c.png', 'missing.png']
    assert all(map(os.path.isfile, found[:3]))
    for wrong, message in (('no', 'does not exist'), ('film.mp4', 'is neither a folder')):
        (tmp_path / 'film.mp4').touch()
        with pytest.raises(DataError, match=message):
            list(find_images(str(tmp_path / wrong)))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match=r'has no image; looked for .jpg, .jpeg, .png, .webp'):
        dataset_of(tmp_path / 'empty')


def test_draws_follow_from_seed_epoch_and_index(folder):
    dataset = dataset_of(folder)
    alone = batches(dataset, 0, 0)
    assert alone == batches(dataset, 0, 1) == batches(dataset, 0, 2)
    later = batches(dataset, 1, 2)
    assert later == batches(dataset, 1, 0) != alone
    # The rest of an epoch is that of the whole epoch, and the next one is whole again.
    assert batches(dataset, 1, 2, start=4) == later[2:]
    assert batches(dataset, 0, 0, seed=8) != alone
    draws = {tuple(draw) for _, batch in alone + later for draw in batch}
    assert len(draws) == 24


def test_workers_that_persist_learn_of_the_epoch(folder):
    dataset = dataset_of(folder)
    sampler = RepeatableSampler(dataset, seed=7)
    loader = DataLoader(dataset, 2, sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        result = [(batch['path'], batch['draws'].tolist()) for batch in loader]
        assert result == batches(dataset, epoch, 0)


def test_the_order_is_mmengines(folder):
    dataset = dataset_of(folder)
    ours, theirs = RepeatableSampler(dataset, seed=3), DefaultSampler(dataset, seed=3)
    for epoch in range(2):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(ours) == list(theirs)
    ours.start_at(5)
    assert list(ours) == list(theirs)[5:]
    assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)


def test_generators_stand_as_before():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    with seeded(1, 2, 3):
        first = random.random(), np.random.rand(), torch.rand(()).item()
        assert states() != before
    assert states() == before
    with pytest.raises(KeyError), seeded(1, 2, 3):
        assert first == (random.random(), np.random.rand(), torch.rand(()).item())
        raise KeyError
    assert states() == before
    with seeded(1, 2, 4):
        assert random.random() != first[0]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_bad_images_are_passed_over_and_named_once(folder, tmp_path, num_workers):
    for name in 'bcl':
        (folder / f'{name}.png').write_bytes(b'')
    dataset = dataset_of(folder)
    report = tmp_path / 'bad_images.txt'
    dataset.bad_images.keep_in(str(report))
    results = [batches(dataset, epoch, num_workers) for epoch in (0, 1, 0)]
    assert results[0] == results[2]  # known beforehand or found out: no difference
    for result in results:
        assert len([path for paths, _ in result for path in paths]) == 12
    lines = report.read_text().splitlines()
    assert sorted(line.split('\t')[0] for line in lines) == [
        str(folder / f'{name}.png') for name in 'bcl'
    ]
    assert all('cannot be read' in line for line in lines)
    # The next that can be used stands in: d for b and c, a for l.
    assert [os.path.basename(dataset[i]['path']) for i in (1, 2, 11)] == [
        'd.png',
        'd.png',
        'a.png',
    ]
    # With the draws of its place, not of its own.
    assert not torch.equal(dataset[Draw(1, 7, 0)]['draws'], dataset[Draw(3, 7, 0)]['draws'])
    # Another process, or the same run after an interruption, knows of them.
    again = dataset_of(folder)
    again.bad_images.keep_in(str(report))
    assert len(again.bad_images) == 3 and str(folder / 'b.png') in again.bad_images


@pytest.mark.parametrize(('max_bad', 'allowed'), [(0.01, 5), (0.5, 6), (2, 2), (0, 0)])
def test_too_many_end_the_run(folder, tmp_path, max_bad, allowed):
    dataset = dataset_of(folder, max_bad=max_bad)
    dataset.bad_images.keep_in(str(tmp_path / 'bad_images.txt'))
    for count, path in enumerate(sorted(folder.iterdir())[: allowed + 1], start=1):
        path.write_bytes(b'')
        if count <= allowed:
            assert dataset[0]['path'] > str(path)
    with pytest.raises(DataError) as error_info:
        dataset[0]
    message = str(error_info.value)
    assert message.startswith(f'{allowed + 1} of 12 images cannot be used, more than the {allowed}')
    assert str(folder / 'a.png') in message and 'bad_images.txt' in message and '\n' not in message


def test_none_left(tmp_path):
    (tmp_path / 'only.jpg').touch()
    with pytest.raises(DataError, match='1 of 1 images cannot be used, none is left'):
        dataset_of(tmp_path)[0]
    with pytest.raises(ValueError, match='max_bad=-1'):
        dataset_of(tmp_path, max_bad=-1)


def test_list_of_bad_images_survives_odd_names_and_half_lines(tmp_path):
    path = str(tmp_path / 'bad_images.txt')
    names = ['a\tb', 'line\nbreak', 'back\\nslash', 'ünï\u2028code', 'caf\udce9']
    bad = BadImages(100, 10)
    bad.keep_in(path)
    for name in names:
        bad.add(name, 'some\nreason')
    with open(path, 'ab') as file:
        file.write(b'half a li')
    again = BadImages(100, 10)
    again.keep_in(path)
    assert len(again) == len(names) and all(name in again for name in names)
    again.add('one more', 'r')
    bad.add('one more', 'r')
    last = open(path, 'rb').read().split(b'\n')
    assert last[-2:] == [b'one more\tr', b''] and len(last) == len(names) + 2
