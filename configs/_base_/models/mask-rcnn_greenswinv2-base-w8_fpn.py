# Swin V2, which mmdet has not: pre-trained with windows of 8 tokens on 256x256 pixels, detecting
# with windows of 16. The position network is asked for offsets that it has not seen.
_base_ = './mask-rcnn_greenswin-base-w7_fpn.py'

model = dict(
    backbone=dict(
        type='greenmim_mm.GreenSwinV2',
        window_size=16,
        pretrained_window_sizes=(8, 8, 8, 8),
        init_cfg=dict(
            checkpoint=(
                'work_dirs/greenmim_swinv2-base-w8_8xb256-amp-coslr-200e_in1k-256px/epoch_200.pth'
            ),
        ),
    ),
)
