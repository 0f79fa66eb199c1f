# The recipe of the same name in ../greenmim with SimMIM in GreenMIM's place: network, image size,
# data and schedule are the same.
_base_ = '../greenmim/greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py'

model = dict(
    _delete_=True,
    type='SimMIM',
    data_preprocessor=_base_.model.data_preprocessor,
    backbone=dict(
        type='SimMIMSwinTransformer',
        arch='base',
        stage_cfgs=dict(block_cfgs=dict(window_size=7)),
        img_size=224,
        drop_path_rate=0.0,
    ),
    neck=dict(type='SimMIMLinearDecoder', in_channels=128 * 8, encoder_stride=32),
    head=dict(
        type='SimMIMHead',
        patch_size=4,
        loss=dict(type='PixelReconstructionLoss', criterion='L1', channel=3),
    ),
)

# Masks are drawn for each image while it is loaded, six tenths of the 32x32 pixel units.
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
