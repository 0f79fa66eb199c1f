# mmdet's own Swin with GreenMIM's weights: greenmim_mm need not be installed to run it.
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        drop_path_rate=0.3,
        # The names are mmdet's already. Conversion is for the files of Swin's authors.
        convert_weights=False,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k/epoch_200.pth',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
