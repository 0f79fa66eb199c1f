_base_ = './mask-rcnn_greenmim-greenswin-base-w7_fpn_amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        window_size=(14, 14, 14, 7),
        init_cfg=dict(
            checkpoint='work_dirs/greenmim_swin-large-w14_8xb256-amp-coslr-800e_in1k/epoch_800.pth'
        ),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
