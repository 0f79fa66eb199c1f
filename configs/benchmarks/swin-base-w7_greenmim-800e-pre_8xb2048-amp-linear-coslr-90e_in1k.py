# Linear probing: a linear classifier on features that stay as pre-training left them.
_base_ = [
    '../_base_/models/greenswin-base-w7_224.py',
    '../_base_/datasets/imagenet_bs256_finetune_224.py',
    '../_base_/schedules/linear_lars_coslr_90e.py',
    '../_base_/pretrain_runtime.py',
]

model = dict(
    backbone=dict(
        # All of them, with the embedding and the last norm.
        frozen_stages=3,
        drop_path_rate=0.0,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/greenmim_swin-base-w7_8xb256-amp-coslr-800e_in1k/epoch_800.pth',
        ),
    ),
    neck=[
        dict(type='GlobalAveragePooling'),
        # A norm without parameters of its own: features of any scale suit one learning rate.
        dict(type='ClsBatchNormNeck', input_features=1024, affine=False),
    ],
    head=dict(
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.01, bias=0.0),
        loss=dict(_delete_=True, type='CrossEntropyLoss'),
    ),
    train_cfg=None,
)

# Crops and flips alone.
train_pipeline = [*_base_.train_pipeline[:3], dict(type='PackInputs')]
train_dataloader = dict(batch_size=2048, dataset=dict(pipeline=train_pipeline))
