# The recipe of the same name in ../greenmim with SimMIM in GreenMIM's place.
_base_ = [
    '../_base_/models/simmim_swin-base.py',
    '../_base_/datasets/imagenet_bs256_simmim.py',
    '../_base_/schedules/adamw_coslr_200e.py',
    '../_base_/pretrain_runtime.py',
]

model = dict(backbone=dict(type='greenmim_mm.SimMIMSwinTransformerV2', img_size=256, window_size=8))

train_pipeline = _base_.train_pipeline
train_pipeline[0]['scale'] = 256  # LoadRandomResizedCrop
train_pipeline[2]['input_size'] = 256  # SimMIMMaskGenerator
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
