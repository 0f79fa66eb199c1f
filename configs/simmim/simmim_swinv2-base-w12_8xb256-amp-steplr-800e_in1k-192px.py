_base_ = [
    '../_base_/models/simmim_swin-base.py',
    '../_base_/datasets/imagenet_bs256_simmim_192.py',
    '../_base_/schedules/simmim_adamw_steplr_800e.py',
    '../_base_/pretrain_runtime.py',
]

model = dict(
    backbone=dict(
        type='greenmim_mm.SimMIMSwinTransformerV2',
        img_size=192,
        # At 192 pixels the maps have sides of 48, 24, 12 and 6 tokens.
        window_size=(12, 12, 12, 6),
        drop_path_rate=0.1,
    ),
    # Pixels are guessed relative to the 47x47 around them.
    head=dict(type='greenmim_mm.SimMIMNormHead', norm_size=47),
)
