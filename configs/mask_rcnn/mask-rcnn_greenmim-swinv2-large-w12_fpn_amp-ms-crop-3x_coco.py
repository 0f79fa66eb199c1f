_base_ = './mask-rcnn_greenmim-swinv2-base-w8_fpn_amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        pretrained_window_sizes=(12, 12, 12, 6),
        init_cfg=dict(
            checkpoint=(
                'work_dirs/greenmim_swinv2-large-w12_8xb256-amp-coslr-200e_in1k-192px/epoch_200.pth'
            ),
        ),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
