# The heads of Swin's repository: four convolutions and one fully connected layer, and boxes that
# are compared decoded, by class.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'

bbox_heads = [
    dict(
        type='ConvFCBBoxHead',
        num_shared_convs=4,
        num_shared_fcs=1,
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=stds
        ),
        reg_class_agnostic=False,
        reg_decoded_bbox=True,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
    )
    for stds in (
        [0.1, 0.1, 0.2, 0.2],
        [0.05, 0.05, 0.1, 0.1],
        [0.033, 0.033, 0.067, 0.067],
    )
]

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
    roi_head=dict(bbox_head=bbox_heads),
)
