_base_ = './greenmim_swinv2-base-w8_8xb256-amp-coslr-200e_in1k-256px.py'

model = dict(
    # At 192 pixels the maps have sides of 48, 24, 12 and 6 tokens; a window of Swin V2 may not be
    # larger than its map.
    backbone=dict(arch='large', img_size=192, window_size=(12, 12, 12, 6)),
    neck=dict(embed_dim=1536),
)

train_pipeline = _base_.train_pipeline
train_pipeline[0]['scale'] = 192  # LoadRandomResizedCrop
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
