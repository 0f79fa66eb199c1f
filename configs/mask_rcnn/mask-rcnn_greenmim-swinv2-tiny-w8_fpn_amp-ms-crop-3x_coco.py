_base_ = './mask-rcnn_greenmim-swinv2-base-w8_fpn_amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.2,
        init_cfg=dict(
            checkpoint=(
                'work_dirs/greenmim_swinv2-tiny-w8_8xb256-amp-coslr-200e_in1k-256px/epoch_200.pth'
            ),
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
