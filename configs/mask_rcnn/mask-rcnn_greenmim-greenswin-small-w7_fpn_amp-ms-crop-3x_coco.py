_base_ = './mask-rcnn_greenmim-greenswin-base-w7_fpn_amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.2,
        init_cfg=dict(
            checkpoint='work_dirs/greenmim_swin-small-w7_8xb256-amp-coslr-400e_in1k/epoch_400.pth'
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
