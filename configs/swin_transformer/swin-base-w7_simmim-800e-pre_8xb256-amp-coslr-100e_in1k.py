_base_ = './swin-base-w7_greenmim-800e-pre_8xb256-amp-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='work_dirs/simmim_swin-base-w6_8xb256-amp-steplr-800e_in1k-192px/epoch_800.pth'
        )
    )
)

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
