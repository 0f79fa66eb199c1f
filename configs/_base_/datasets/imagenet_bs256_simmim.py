# GreenMIM's images with SimMIM's masks, which are drawn for each image while it is loaded: six
# tenths of the 32x32 pixel units.
_base_ = './imagenet_bs256_greenmim.py'

train_pipeline = [
    *_base_.train_pipeline[:-1],
    dict(
        type='SimMIMMaskGenerator',
        input_size=224,
        mask_patch_size=32,
        model_patch_size=4,
        mask_ratio=0.6,
    ),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
