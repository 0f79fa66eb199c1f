_base_ = './greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py'

# The maps have sides of 64, 32, 16 and 8 tokens.
model = dict(backbone=dict(type='greenmim_mm.GreenSwinV2', img_size=256, window_size=8))

train_pipeline = _base_.train_pipeline
train_pipeline[0]['scale'] = 256  # LoadRandomResizedCrop
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
