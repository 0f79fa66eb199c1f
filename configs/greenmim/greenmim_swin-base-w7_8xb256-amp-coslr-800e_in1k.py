_base_ = [
    '../_base_/models/greenmim_swin-base-w7.py',
    '../_base_/datasets/imagenet_bs256_greenmim.py',
    '../_base_/schedules/adamw_coslr_800e.py',
    '../_base_/pretrain_runtime.py',
]

# 1e-4 for each 256 images of a step.
optim_wrapper = dict(optimizer=dict(lr=1e-4 * 2048 / 256))
