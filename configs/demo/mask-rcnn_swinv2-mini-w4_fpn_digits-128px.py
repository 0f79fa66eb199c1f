# As the demo's detector that it inherits, with Swin V2, which mmdet has not.
_base_ = './mask-rcnn_swin-mini-w4_fpn_digits-128px.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='greenmim_mm.GreenSwinV2',
        arch=dict(
            embed_dims=24,
            depths=(2, 2, 4, 2),
            num_heads=(1, 2, 4, 8),
            extra_norm_every_n_blocks=0,
        ),
        img_size=128,
        window_size=4,
        drop_path_rate=0.0,
        out_indices=(0, 1, 2, 3),
        pad_small_map=True,
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
