optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # As mmsegmentation's recipes for Swin; biases decay.
    paramwise_cfg=dict(
        custom_keys=dict(
            norm=dict(decay_mult=0.0), relative_position_bias_table=dict(decay_mult=0.0)
        )
    ),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# For --auto-scale-lr: 8 GPUs with 2 images each.
auto_scale_lr = dict(enable=False, base_batch_size=16)
