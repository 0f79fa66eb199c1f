_base_ = './upernet_greenmim-greenswin-base-w7_8xb2-amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='tiny',
        init_cfg=dict(
            checkpoint='work_dirs/greenmim_swin-tiny-w7_8xb256-amp-coslr-400e_in1k/epoch_400.pth'
        ),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
