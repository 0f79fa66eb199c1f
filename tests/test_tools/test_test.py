"""tools/test.py, as it is called."""

import json
import pickle

import cv2
import numpy as np
import torch
from mmdet.datasets import CocoDataset
from tool_runs import DETECTOR, refused


def test_testing_a_detector(tools, tmp_path):
    """mmdet's recipe through tools/test.py, with the predictions written."""
    root = tmp_path / 'coco'
    (root / 'val2017').mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert cv2.imwrite(str(root / 'val2017' / '1.jpg'), image)
    annotations = dict(
        images=[dict(id=1, file_name='1.jpg', height=64, width=64)],
        annotations=[
            dict(id=1, image_id=1, category_id=1, iscrowd=0, area=900, bbox=[10, 10, 30, 30])
            | dict(segmentation=[[10, 10, 40, 10, 40, 40, 10, 40]])
        ],
        # All of COCO's: an untrained detector finds any of them.
        categories=[dict(id=i, name=n) for i, n in enumerate(CocoDataset.METAINFO['classes'], 1)],
    )
    (root / 'annotations').mkdir()
    path = root / 'annotations' / 'instances_val2017.json'
    path.write_text(json.dumps(annotations))
    checkpoint, out = tmp_path / 'none.pth', tmp_path / 'out.pkl'
    torch.save(dict(state_dict={}), checkpoint)
    tools('test').main(
        [
            str(DETECTOR),
            str(checkpoint),
            f'--out={out}',
            f'--work-dir={tmp_path / "run"}',
            '--cfg-options',
            f'test_dataloader.dataset.data_root={root}/',
            'test_dataloader.num_workers=0',
            f'test_evaluator.ann_file={path}',
            'test_dataloader.dataset.pipeline.1.scale=(128,128)',
            'model.backbone.embed_dims=32',
            'model.backbone.depths=[1,1,1,1]',
            'model.backbone.num_heads=[1,2,4,8]',
            'model.neck.in_channels=[32,64,128,256]',
            'model.test_cfg.rpn.max_per_img=10',
            'model.test_cfg.rcnn.score_thr=0.0',
        ]
    )
    (metrics_file,) = (tmp_path / 'run').glob('*/*.json')
    assert 'coco/segm_mAP' in json.loads(metrics_file.read_text())
    (prediction,) = pickle.loads(out.read_bytes())
    assert prediction['img_id'] == 1
    assert 'counts' in prediction['pred_instances']['masks'][0]


def test_test_tool_refuses(tools, capsys, small_config, tmp_path):
    tool = tools('test')
    assert 'nothing to test' in refused(tool, capsys, small_config, tmp_path / 'no.pth')
    line = refused(tool, capsys, DETECTOR, tmp_path / 'no.pth')
    assert f'checkpoint {tmp_path / "no.pth"} does not exist' in line
    line = refused(tool, capsys, DETECTOR, 'no.pth', '--out', 'predictions.json')
    assert '--out predictions.json' in line
    (tmp_path / 'yes.pth').touch()
    line = refused(
        tool,
        capsys,
        DETECTOR,
        tmp_path / 'yes.pth',
        '--cfg-options',
        f'test_dataloader.dataset.data_root={tmp_path}/coco/',
    )
    assert f'data folder {tmp_path}/coco/val2017/' in line
