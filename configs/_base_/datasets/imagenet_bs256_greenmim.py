# Pre-training needs no labels, so every image below data/imagenet/train counts, whatever the
# folders are called and however many there are: subsets of ImageNet work as well.
train_pipeline = [
    # Images of any kind; one that cannot be read is named and passed over.
    dict(
        type='greenmim_mm.LoadRandomResizedCrop',
        scale=224,
        crop_ratio_range=(0.2, 1.0),
        interpolation='bicubic',
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=256,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='greenmim_mm.RepeatableSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        _scope_='mmpretrain',
        type='greenmim_mm.UnlabelledImages',
        data_root='data/imagenet',
        data_prefix='train',
        pipeline=train_pipeline,
    ),
)
