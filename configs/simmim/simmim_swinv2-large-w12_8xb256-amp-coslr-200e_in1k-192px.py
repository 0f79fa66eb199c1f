# The recipe of the same name in ../greenmim with SimMIM in GreenMIM's place.
_base_ = './simmim_swinv2-base-w8_8xb256-amp-coslr-200e_in1k-256px.py'

model = dict(
    backbone=dict(arch='large', img_size=192, window_size=(12, 12, 12, 6)),
    neck=dict(in_channels=192 * 8),
)

train_pipeline = _base_.train_pipeline
train_pipeline[0]['scale'] = 192  # LoadRandomResizedCrop
train_pipeline[2]['input_size'] = 192  # SimMIMMaskGenerator
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
