"""Data that is half there or does not fit: which folder or file, and what was expected."""

import json

import pytest

from greenmim_mm.datasets import DataError, check_contents, coco_classes
from greenmim_mm.extras import need

NAME = 'train_dataloader.dataset'


def message(dataset: dict, model: dict | None = None) -> str:
    with pytest.raises(DataError) as error_info:
        check_contents(dataset, NAME, model)
    text = str(error_info.value)
    assert '\n' not in text and NAME in text
    return text


@pytest.fixture
def coco(tmp_path):
    """Two images and two classes."""
    (tmp_path / 'images').mkdir()
    for name in ('1.jpg', '2.jpg'):
        (tmp_path / 'images' / name).touch()
    content = dict(
        images=[dict(id=i, file_name=f'{i}.jpg', height=8, width=8) for i in (1, 2)],
        categories=[dict(id=7, name='nut'), dict(id=3, name='bolt')],
        annotations=[],
    )
    (tmp_path / 'all.json').write_text(json.dumps(content))
    return dict(
        type='CocoDataset',
        data_root=str(tmp_path),
        ann_file='all.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=('nut', 'bolt')),
    )


def test_coco_that_fits(coco):
    model = dict(roi_head=dict(bbox_head=[dict(num_classes=2)], mask_head=dict(num_classes=2)))
    check_contents(coco, NAME, model | dict(rpn_head=dict(num_classes=1)))
    check_contents(dict(type='RepeatDataset', dataset=coco, times=2), NAME, model)
    # A part of the classes is no mistake.
    check_contents(dict(coco, metainfo=dict(classes=('bolt',))), NAME)


def test_images_missing(coco, tmp_path):
    (tmp_path / 'images/2.jpg').unlink()
    text = message(coco)
    assert '1 of the 2 images' in text and f'{tmp_path}/images/2.jpg' in text
    assert f'{tmp_path}/all.json' in text


def test_images_in_a_folder_that_is_not_there(coco, tmp_path):
    content = json.loads((tmp_path / 'all.json').read_text())
    content['images'][0]['file_name'] = 'more/1.jpg'
    (tmp_path / 'all.json').write_text(json.dumps(content))
    assert f'{tmp_path}/images/more/1.jpg' in message(coco)


def test_classes_that_the_annotations_do_not_have(coco):
    text = message(dict(coco, metainfo=dict(classes=('nut', 'screw'))))
    assert 'has 2 classes (nut, bolt), but not 1 of the 2 to be learned (screw)' in text
    # COCO's own, where the config names none.
    coco.pop('metainfo')
    assert 'but not 80 of the 80 to be learned (person, bicycle, car, ...)' in message(coco)


def test_classes_that_differ_from_the_models(coco):
    model = dict(roi_head=dict(bbox_head=[dict(num_classes=2), dict(num_classes=80)]))
    text = message(coco, model)
    assert 'has 2 classes and model.roi_head.bbox_head.1.num_classes is 80' in text
    assert '--cfg-options model.roi_head.bbox_head.1.num_classes=2' in text


@pytest.mark.parametrize('content', ['', '{', '[]', '{"images": []}', '{"categories": {}}'])
def test_damaged_annotations(coco, tmp_path, content):
    (tmp_path / 'all.json').write_text(content)
    for refuse in (lambda: check_contents(coco), lambda: coco_classes(tmp_path / 'all.json')):
        with pytest.raises(DataError, match='cannot be read|not in COCO'):
            refuse()


def test_classes_are_read_in_the_order_of_the_file(coco, tmp_path):
    from mmdet.datasets import CocoDataset

    classes = coco_classes(tmp_path / 'all.json')
    assert classes == ('nut', 'bolt')
    # mmdet's labels are places in this order.
    data = CocoDataset(
        **{key: value for key, value in coco.items() if key != 'type'}, pipeline=[], test_mode=True
    )
    assert [data.cat2label[7], data.cat2label[3]] == [0, 1]


@pytest.mark.parametrize(
    ('names', 'text'),
    [([], 'names no classes'), (['nut', 'bolt', 'nut'], 'names classes twice: nut')],
)
def test_classes_that_make_no_sense(tmp_path, names, text):
    path = tmp_path / 'all.json'
    path.write_text(json.dumps(dict(images=[], categories=[dict(name=name) for name in names])))
    with pytest.raises(DataError, match=text):
        coco_classes(path)
    with pytest.raises(DataError, match='does not exist'):
        coco_classes(tmp_path / 'none.json')


def test_imagenet_half_there(tmp_path):
    for name in ('n01', 'n02'):
        (tmp_path / 'train' / name).mkdir(parents=True)
    dataset = dict(type='ImageNet', data_root=str(tmp_path), split='train')
    text = message(dataset)
    assert f'{tmp_path}/train' in text
    assert 'has 2 folders of classes (n01, n02) where 1000 are expected' in text
    # mmpretrain reads lists, where there are some, and images without labels, as they are.
    check_contents(dict(dataset, with_label=False), NAME)
    (tmp_path / 'meta').mkdir()
    (tmp_path / 'meta/train.txt').touch()
    check_contents(dataset, NAME)


def test_folders_of_classes_and_the_head(tmp_path):
    for name in ('ant', 'bee', 'cat'):
        (tmp_path / name).mkdir()
    dataset = dict(type='CustomDataset', data_root=str(tmp_path))
    check_contents(dataset, NAME, dict(head=dict(num_classes=3)))
    text = message(dataset, dict(head=dict(num_classes=1000)))
    assert 'has 3 classes and model.head.num_classes is 1000' in text


def test_maps_of_classes_missing(tmp_path):
    (tmp_path / 'images').mkdir()
    for name in ('a', 'b'):
        (tmp_path / f'images/{name}.jpg').touch()
    prefix = dict(img_path='images', seg_map_path='maps')
    dataset = dict(type='ADE20KDataset', data_root=str(tmp_path), data_prefix=prefix)
    assert f'folder {tmp_path}/maps of' in message(dataset)
    (tmp_path / 'maps').mkdir()
    (tmp_path / 'maps/a.png').touch()
    assert '1 of the 2 images' in message(dataset) and message(dataset).endswith(': b')
    (tmp_path / 'maps/b.png').touch()
    check_contents(dataset, NAME)


def test_remote_data_is_not_ours_to_judge():
    check_contents(dict(type='ImageNet', data_root='s3://bucket', split='train'), NAME)
    check_contents(dict(type='CIFAR10', data_root='nowhere'), NAME)


@pytest.mark.parametrize(
    ('upstream', 'extra'), [(False, 'segmentation'), (True, 'openmmlab-segmentation')]
)
def test_an_extra_that_is_not_installed(upstream, extra, monkeypatch):
    monkeypatch.setattr('greenmim_mm.extras.is_upstream', lambda: upstream)
    need('torch', 'maintained')
    command = rf"pip install 'greenmim-mm\[{extra}\]'"
    with pytest.raises(ModuleNotFoundError, match=f'no_such_package, .* not installed; {command}'):
        need('no_such_package', 'segmentation')
