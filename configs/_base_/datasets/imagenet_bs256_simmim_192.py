# As SimMIM's authors: 192 pixels, larger crops, resized bilinearly.
_base_ = './imagenet_bs256_greenmim.py'

train_pipeline = [
    dict(
        type='greenmim_mm.LoadRandomResizedCrop',
        scale=192,
        crop_ratio_range=(0.67, 1.0),
        interpolation='bilinear',
    ),
    dict(type='RandomFlip', prob=0.5),
    # Masks are drawn for each image while it is loaded.
    dict(
        type='SimMIMMaskGenerator',
        input_size=192,
        mask_patch_size=32,
        model_patch_size=4,
        mask_ratio=0.6,
    ),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
