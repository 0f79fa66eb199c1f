# Swin V2, which mmdet has not: pre-trained with windows of 8 tokens on 256x256 pixels, detecting
# with windows of 16. The position network is asked for offsets that it has not seen.
_base_ = './mask-rcnn_greenmim-swin-base-w7_fpn_amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='greenmim_mm.GreenSwinV2',
        arch='base',
        window_size=16,
        pretrained_window_sizes=(8, 8, 8, 8),
        drop_path_rate=0.3,
        out_indices=(0, 1, 2, 3),
        # Maps smaller than a window are padded to it.
        pad_small_map=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint=(
                'work_dirs/greenmim_swinv2-base-w8_8xb256-amp-coslr-200e_in1k-256px/epoch_200.pth'
            ),
        ),
    ),
)

# Neither the position network nor the scale of its attention decays.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(cpb_mlp=dict(decay_mult=0.0), logit_scale=dict(decay_mult=0.0))
    )
)
