# As the recipe that it inherits, with the backbone of this package: it computes the same, takes
# checkpoints of any window size and refuses one that does not fit.
_base_ = './mask-rcnn_greenmim-swin-base-w7_fpn_amp-ms-crop-3x_coco.py'

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
)
