_base_ = 'mmpretrain::_base_/default_runtime.py'

default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=3))

# Masks and the order of the images follow from the seed, also after --resume.
randomness = dict(seed=0)
