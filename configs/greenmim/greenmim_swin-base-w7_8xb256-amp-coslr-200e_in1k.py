_base_ = [
    '../_base_/models/greenmim_swin-base-w7.py',
    '../_base_/datasets/imagenet_bs256_greenmim.py',
    '../_base_/schedules/adamw_coslr_200e.py',
    '../_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=3))

# Masks and the order of the images follow from the seed, also after --resume.
randomness = dict(seed=0)
