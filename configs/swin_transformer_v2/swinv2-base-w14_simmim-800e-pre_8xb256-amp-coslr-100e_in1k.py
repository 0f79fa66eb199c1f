_base_ = '../swin_transformer/swin-base-w7_greenmim-800e-pre_8xb256-amp-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        type='greenmim_mm.GreenSwinV2',
        window_size=(14, 14, 14, 7),
        # The windows of pre-training, at 192 pixels: offsets are measured by them.
        pretrained_window_sizes=(12, 12, 12, 6),
        init_cfg=dict(
            checkpoint='work_dirs/simmim_swinv2-base-w12_8xb256-amp-steplr-800e_in1k-192px/epoch_800.pth'
        ),
    )
)

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.75))
