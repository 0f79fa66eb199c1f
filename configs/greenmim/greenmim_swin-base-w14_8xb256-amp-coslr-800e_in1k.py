_base_ = './greenmim_swin-base-w7_8xb256-amp-coslr-800e_in1k.py'

# At 224 pixels the maps have sides of 56, 28, 14 and 7 tokens: a larger window in the last stage
# would leave three quarters of its bias table untrained.
model = dict(backbone=dict(window_size=(14, 14, 14, 7)))

# 1.5e-4 for each 256 images of a step.
optim_wrapper = dict(optimizer=dict(lr=1.5e-4 * 2048 / 256))
