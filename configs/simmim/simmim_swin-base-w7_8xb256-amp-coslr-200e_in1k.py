# The recipe of the same name in ../greenmim with SimMIM in GreenMIM's place: network, image size,
# data and schedule are the same.
_base_ = [
    '../_base_/models/simmim_swin-base.py',
    '../_base_/datasets/imagenet_bs256_simmim.py',
    '../_base_/schedules/adamw_coslr_200e.py',
    '../_base_/pretrain_runtime.py',
]

model = dict(backbone=dict(img_size=224, stage_cfgs=dict(block_cfgs=dict(window_size=7))))
