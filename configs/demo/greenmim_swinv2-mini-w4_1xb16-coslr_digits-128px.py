# As the demo's pre-training that it inherits, with Swin V2.
_base_ = './greenmim_swin-mini-w4_1xb16-coslr_digits-128px.py'

model = dict(
    backbone=dict(
        # At 128 pixels the maps have sides of 32, 16, 8 and 4 tokens: no window is larger.
        type='greenmim_mm.GreenSwinV2',
        arch=dict(extra_norm_every_n_blocks=0),
    )
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(
            cpb_mlp=dict(decay_mult=0.0),
            logit_scale=dict(decay_mult=0.0),
        )
    )
)
