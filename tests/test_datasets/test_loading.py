"""Training on labelled images goes on where some cannot be loaded, and not for ever."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DefaultScope
from mmpretrain.datasets import CustomDataset
from PIL import Image

from greenmim_mm.datasets import DataError, LoadImageFromFile, PassOverBadImages

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
OURS = dict(type='greenmim_mm.LoadImageFromFile')
MMCV = dict(type='LoadImageFromFile')


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def make_images(folder, count, bad=()):
    for index in range(count):
        path = folder / f'{index % 2}' / f'{index:03}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        if index in bad:
            path.write_bytes(b'')
        else:
            Image.new('RGB', (8, 8), (index, 0, 0)).save(path)
    return str(folder)


def labelled(folder, **kwargs):
    loader = dict(type='greenmim_mm.PassOverBadImages', **{'transform': OURS, **kwargs})
    return CustomDataset(data_root=folder, pipeline=[loader])


@pytest.mark.parametrize('transform', [OURS, MMCV])
def test_one_bad_image_in_fifty(tmp_path, transform, caplog):
    dataset = labelled(make_images(tmp_path, 50, bad=[7]), transform=transform)
    assert len(dataset) == 50
    for _ in range(20):
        for index in range(50):
            assert dataset[index]['img'].shape == (8, 8, 3)
    # The others are what they were.
    assert dataset[0]['img_path'].endswith('000.png')
    named = [record for record in caplog.records if '007.png is passed over' in record.message]
    assert len(named) <= 1
    alone = PassOverBadImages(transform)
    assert alone(dict(img_path=str(tmp_path / '1/007.png'))) is None
    assert np.array_equal(
        alone(dict(img_path=str(tmp_path / '0/002.png')))['img'],
        LoadImageFromFile()(dict(img_path=str(tmp_path / '0/002.png')))['img'],
    )


def test_too_many_bad_images(tmp_path):
    dataset = labelled(make_images(tmp_path, 20, bad=range(0, 20, 3)))
    with pytest.raises(DataError, match=r'6 of \d+ images cannot be used, .*\.png \(') as error:
        for _ in range(9):
            for index in range(20):
                dataset[index]
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='max_bad=2 must be a share'):
        PassOverBadImages(OURS, max_bad=2)


def test_a_test_leaves_out_nothing(tmp_path):
    class Listed(BaseDataset):
        def load_data_list(self):
            return [dict(img_path=str(tmp_path / 'no.png'))]

    dataset = Listed(pipeline=[PassOverBadImages(OURS)], test_mode=True)
    with pytest.raises(Exception, match='None'):
        dataset[0]


@pytest.mark.parametrize(
    'name', ['imagenet_bs256_finetune_224', 'coco_instance_ms-crop', 'ade20k_512']
)
def test_recipes_pass_over_bad_images(name):
    cfg = Config.fromfile(CONFIGS / f'_base_/datasets/{name}.py')
    loader = cfg.train_dataloader.dataset.pipeline[0]
    assert loader.type == 'greenmim_mm.PassOverBadImages'
    assert loader.transform.type.endswith('LoadImageFromFile')
    dataset = cfg.get('val_dataloader').dataset
    assert dataset.pipeline[0].type.endswith('LoadImageFromFile')
