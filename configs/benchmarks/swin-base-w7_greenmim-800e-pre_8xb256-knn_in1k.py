# Frozen features judged by their 20 nearest neighbours; nothing is trained:
#     python tools/test.py CONFIG work_dirs/.../epoch_800.pth
# tools/knn.py does the same for any checkpoint, without a config.
_base_ = [
    '../_base_/models/greenswin-base-w7_224.py',
    '../_base_/datasets/imagenet_bs256_finetune_224.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(head=None, train_cfg=None)

# Nothing is trained; what was the training set is what images are compared with.
train_pipeline = None
train_dataloader = None
bank_dataloader = dict(
    batch_size=256,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageNet', data_root='data/imagenet', split='train', pipeline=_base_.test_pipeline
    ),
)
val_dataloader = None
val_evaluator = None
test_dataloader = dict(batch_size=256)
test_cfg = dict(
    type='greenmim_mm.KNNTestLoop', bank_dataloader=bank_dataloader, k=20, temperature=0.07
)
