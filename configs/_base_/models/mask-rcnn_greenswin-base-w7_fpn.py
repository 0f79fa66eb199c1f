_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='greenmim_mm.GreenSwin',
        arch='base',
        window_size=7,
        drop_path_rate=0.3,
        out_indices=(0, 1, 2, 3),
        # As mmdet: maps smaller than a window are padded to it.
        pad_small_map=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k/epoch_200.pth',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
