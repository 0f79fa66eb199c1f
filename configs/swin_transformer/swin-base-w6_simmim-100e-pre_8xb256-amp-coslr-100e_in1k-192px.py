_base_ = './swin-base-w7_simmim-100e-pre_8xb256-amp-coslr-100e_in1k.py'

model = dict(backbone=dict(img_size=192, window_size=6))

train_pipeline = _base_.train_pipeline
train_pipeline[1]['scale'] = 192  # RandomResizedCrop
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

# The same share of the image as 224 of 256 pixels.
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = 219  # ResizeEdge
test_pipeline[2]['crop_size'] = 192  # CenterCrop
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
