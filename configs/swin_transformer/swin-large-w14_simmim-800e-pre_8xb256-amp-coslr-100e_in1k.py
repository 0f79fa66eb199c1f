_base_ = './swin-base-w7_greenmim-800e-pre_8xb256-amp-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        arch='large',
        window_size=(14, 14, 14, 7),
        drop_path_rate=0.2,
        init_cfg=dict(
            checkpoint='work_dirs/simmim_swin-large-w12_8xb256-amp-steplr-800e_in1k-192px/epoch_800.pth'
        ),
    ),
    head=dict(in_channels=1536),
)

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
