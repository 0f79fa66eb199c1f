# SimMIM's learning rates are meant for each 512 images of a step; all of them grow with the batch.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4 * 2048 / 512, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    # What does not decay is the same as in adamw_coslr_200e.py.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(
            relative_position_bias_table=dict(decay_mult=0.0),
            mask_token=dict(decay_mult=0.0),
            cpb_mlp=dict(decay_mult=0.0),
            logit_scale=dict(decay_mult=0.0),
            q_bias=dict(decay_mult=0.0),
            v_bias=dict(decay_mult=0.0),
        ),
    ),
)

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-6 / 2e-4,
        by_epoch=True,
        begin=0,
        end=10,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=90,
        eta_min=1e-5 * 2048 / 512,
        by_epoch=True,
        begin=10,
        end=100,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100)

# For --auto-scale-lr: the batch that the learning rates above are meant for.
auto_scale_lr = dict(enable=False, base_batch_size=2048)
