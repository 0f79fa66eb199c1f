_base_ = './swin-base-w7_greenmim-800e-pre_8xb256-amp-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            # Of windows of 6 tokens; the tables of biases are resized while loading.
            checkpoint='work_dirs/simmim_swin-base-w6_8xb256-amp-coslr-100e_in1k-192px/epoch_100.pth'
        )
    )
)
