# One GPU and a plain folder of images:
#     python tools/train.py CONFIG --cfg-options train_dataloader.dataset.data_root=FOLDER
_base_ = '../greenmim/greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py'

model = dict(backbone=dict(arch='tiny'), neck=dict(embed_dim=768))

train_dataloader = dict(
    batch_size=128,
    num_workers=4,
    # A folder may hold fewer images than a batch.
    drop_last=False,
    dataset=dict(data_root='data/images', data_prefix=''),
)

optim_wrapper = dict(optimizer=dict(lr=1.5e-4 * 128 / 256))

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-4,
        by_epoch=True,
        begin=0,
        end=10,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=90,
        by_epoch=True,
        begin=10,
        end=100,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(max_epochs=100)

# A folder is soon read through: a checkpoint for each epoch would take longer than the epoch.
default_hooks = dict(checkpoint=dict(interval=10))

auto_scale_lr = dict(base_batch_size=128)
