# The recipe of the same name in ../greenmim with SimMIM in GreenMIM's place.
_base_ = './simmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py'

model = dict(
    backbone=dict(
        arch='large',
        stage_cfgs=[dict(block_cfgs=dict(window_size=size)) for size in (14, 14, 14, 7)],
    ),
    neck=dict(in_channels=192 * 8),
)
