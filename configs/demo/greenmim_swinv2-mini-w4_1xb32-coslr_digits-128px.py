# As the demo's pre-training that it inherits, with Swin V2.
_base_ = './greenmim_swin-mini-w4_1xb32-coslr_digits-128px.py'

model = dict(
    backbone=dict(
        # At 160 pixels the maps have sides of 40, 20, 10 and 5 tokens: no window is larger.
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
