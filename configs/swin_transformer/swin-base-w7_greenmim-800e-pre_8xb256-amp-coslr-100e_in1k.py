_base_ = [
    '../_base_/models/greenswin-base-w7_224.py',
    '../_base_/datasets/imagenet_bs256_finetune_224.py',
    '../_base_/schedules/finetune_adamw_coslr_100e.py',
    '../_base_/pretrain_runtime.py',
]

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/greenmim_swin-base-w7_8xb256-amp-coslr-800e_in1k/epoch_800.pth',
        )
    )
)
