# GreenMIM on the demo's unlabelled images: a Swin small enough for two CPU cores.
_base_ = ['mmpretrain::_base_/default_runtime.py']

default_scope = 'mmpretrain'
data_root = 'work_dirs/demo/data/'
max_epochs = 3

model = dict(
    type='greenmim_mm.GreenMIM',
    data_preprocessor=dict(
        type='SelfSupDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        type='greenmim_mm.GreenSwin',
        arch=dict(embed_dims=24, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8)),
        img_size=128,
        window_size=4,
        drop_path_rate=0.0,
    ),
    neck=dict(
        type='greenmim_mm.GreenMIMPretrainDecoder',
        embed_dim=192,
        decoder_embed_dim=128,
        decoder_depth=2,
        decoder_num_heads=4,
        # An image has four units a side: waves made for long rows would hardly tell them apart.
        position_wavelengths=(4, 40),
        position_scale=2.0,
    ),
    head=dict(
        type='MAEPretrainHead',
        # Normalised pixels would make noise of calm backgrounds the target.
        norm_pix=False,
        patch_size=32,
        loss=dict(type='PixelReconstructionLoss', criterion='L2'),
    ),
    mask_ratio=0.5,
)

# No crops: a digit that spans several units is what there is to continue.
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root + 'unlabelled',
        with_label=False,
        pipeline=train_pipeline,
    ),
)
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, betas=(0.9, 0.95), weight_decay=0.05),
    clip_grad=dict(max_norm=3.0),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={
            'relative_position_bias_table': dict(decay_mult=0.0),
            'mask_token': dict(decay_mult=0.0),
        },
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=60),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=True,
        begin=0,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=1, max_keep_ckpts=1))
randomness = dict(seed=0)
