# mmpretrain's, for runs that nothing is lost of: docs/reliability.md.
_base_ = 'mmpretrain::_base_/default_runtime.py'

default_hooks = dict(
    checkpoint=dict(type='greenmim_mm.CheckpointHook', interval=1, max_keep_ckpts=3),
)
custom_hooks = [
    dict(type='greenmim_mm.RepeatableRunHook'),
    dict(type='greenmim_mm.InterruptionHook'),
    dict(type='greenmim_mm.NonFiniteLossHook'),
    dict(type='greenmim_mm.GradientNormHook'),
]

# Masks, crops and the order of the images follow from the seed, also after --resume.
randomness = dict(seed=0)
