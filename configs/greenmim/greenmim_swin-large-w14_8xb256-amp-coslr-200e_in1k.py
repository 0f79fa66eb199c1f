_base_ = './greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py'

model = dict(
    # At 224 pixels the maps have sides of 56, 28, 14 and 7 tokens: a larger window in the last
    # stage would leave three quarters of its bias table untrained.
    backbone=dict(arch='large', window_size=(14, 14, 14, 7)),
    neck=dict(embed_dim=1536),
)
