# No weight decay on what is not a matrix of a linear map: biases, norms, position biases and the
# mask token; of Swin V2 also the position network and the scale of its attention. Names that match
# the custom keys are neither called 'bias' nor inside a norm.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    # 1.5e-4 for each 256 images of a step.
    optimizer=dict(type='AdamW', lr=1.5e-4 * 2048 / 256, betas=(0.9, 0.95), weight_decay=0.05),
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
        start_factor=1e-4,
        by_epoch=True,
        begin=0,
        end=40,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=160,
        by_epoch=True,
        begin=40,
        end=200,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=200)

# For --auto-scale-lr: the batch that the learning rate above is meant for.
auto_scale_lr = dict(enable=False, base_batch_size=2048)
