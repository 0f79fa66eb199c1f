_base_ = './greenmim_swin-base-w7_8xb256-amp-coslr-800e_in1k.py'

# The learning rate is that of the recipe above: 1e-4 for each 256 images of a step.
model = dict(
    backbone=dict(arch='large', window_size=(14, 14, 14, 7)),
    neck=dict(embed_dim=1536),
)
