_base_ = [
    '../_base_/models/greenmim_swin-base-w7.py',
    '../_base_/datasets/imagenet_bs256_greenmim.py',
    '../_base_/schedules/adamw_coslr_200e.py',
    '../_base_/pretrain_runtime.py',
]
