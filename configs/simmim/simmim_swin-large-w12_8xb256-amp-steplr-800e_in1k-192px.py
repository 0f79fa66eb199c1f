_base_ = './simmim_swin-base-w6_8xb256-amp-steplr-800e_in1k-192px.py'

model = dict(
    backbone=dict(
        arch='large',
        # At 192 pixels the maps have sides of 48, 24, 12 and 6 tokens.
        stage_cfgs=[dict(block_cfgs=dict(window_size=size)) for size in (12, 12, 12, 6)],
    ),
    neck=dict(in_channels=192 * 8),
)
