"""What people do with the weights: mmdet's inferencer, mmpretrain's features, all formats."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from recipe_runs import WIDTHS, build, load, short, shrink

from greenmim_mm.checkpoint import FORMATS, convert_file
from greenmim_mm.evaluation import feature_extractor
from greenmim_mm.models import GreenSwin, GreenSwinV2

ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4))


@pytest.fixture(scope='module')
def image():
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.resize(small, (96, 64))


@pytest.mark.parametrize('backbone', ['greenswin-base-w7', 'swinv2-base-w8'])
def test_detections_through_mmdets_inferencer(backbone, image, tmp_path):
    from mmdet.apis import DetInferencer

    cfg = shrink(load(f'mask_rcnn/mask-rcnn_greenmim-{backbone}_fpn_amp-1x_coco'))
    cfg = short(cfg, tmp_path)
    cfg.model.backbone.init_cfg = None
    model = build(cfg).eval()
    weights = tmp_path / 'epoch_12.pth'
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=('a',) * 80))),
        weights,
    )
    inferencer = DetInferencer(
        cfg, str(weights), device='cpu', palette='random', show_progress=False
    )
    (found,) = inferencer(image, return_datasamples=True, no_save_vis=True)['predictions']
    for name, value in inferencer.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0)
    # The same by hand, as the model's own data preprocessor and the pipeline have it.
    resized = cv2.resize(image, (128, 85))
    data = dict(
        inputs=[torch.from_numpy(resized).permute(2, 0, 1)],
        data_samples=[found.new(metainfo=found.metainfo)],
    )
    with torch.no_grad():
        (expected,) = model.test_step(data)
    assert len(found.pred_instances) == len(expected.pred_instances) > 0
    torch.testing.assert_close(found.pred_instances.bboxes, expected.pred_instances.bboxes)
    assert found.pred_instances.masks.shape[1:] == image.shape[:2]


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """One Swin in each of the formats, and its backbone."""
    folder = tmp_path_factory.mktemp('formats')
    backbone = GreenSwin(ARCH, window_size=2, img_size=64).eval()
    torch.save(dict(state_dict=backbone.state_dict()), folder / 'own.pth')
    files = {}
    for name in FORMATS:
        files[name] = folder / (name if name == 'huggingface' else f'{name}.pth')
        convert_file(folder / 'own.pth', files[name], name, strict=False)
    return files, backbone


@pytest.mark.parametrize('name', sorted(FORMATS))
def test_features_from_checkpoints_of_any_format(name, checkpoints, image):
    files, backbone = checkpoints
    # timm's files do not tell windows.
    windows = 2 if name == 'timm' else None
    extractor = feature_extractor(files[name], windows, img_size=64, resize=64, device='cpu')
    (found,) = extractor(image, stage='backbone')
    cut = image[:, 16:80, ::-1].astype(np.float32)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    x = torch.from_numpy(((cut - mean) / std).astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        (expected,) = backbone(x)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
    ((pooled,),) = extractor(image)
    torch.testing.assert_close(pooled, expected[0].mean((1, 2)), rtol=1e-3, atol=1e-4)
    assert pooled.shape == (128,)


def test_features_of_swin_v2(image, tmp_path):
    backbone = GreenSwinV2(dict(ARCH, extra_norm_every_n_blocks=0), window_size=2).eval()
    torch.save(dict(state_dict=backbone.state_dict()), tmp_path / 'v2.pth')
    extractor = feature_extractor(tmp_path / 'v2.pth', img_size=64, device='cpu')
    ((pooled,),) = extractor(image)
    assert pooled.shape == (WIDTHS[-1],) and isinstance(extractor.config, Config)
