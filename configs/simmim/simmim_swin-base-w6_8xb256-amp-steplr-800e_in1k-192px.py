_base_ = [
    '../_base_/models/simmim_swin-base.py',
    '../_base_/datasets/imagenet_bs256_simmim_192.py',
    '../_base_/schedules/simmim_adamw_steplr_800e.py',
    '../_base_/pretrain_runtime.py',
]

model = dict(backbone=dict(img_size=192, stage_cfgs=dict(block_cfgs=dict(window_size=6))))
