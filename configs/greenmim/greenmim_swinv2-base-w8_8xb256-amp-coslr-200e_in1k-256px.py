_base_ = './greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='greenmim_mm.GreenSwinV2',
        arch='base',
        img_size=256,
        # The maps have sides of 64, 32, 16 and 8 tokens.
        window_size=8,
        out_indices=(3,),
        drop_path_rate=0.0,
    ),
)

# The second step of the pipeline is RandomResizedCrop.
train_pipeline = _base_.train_pipeline
train_pipeline[1]['scale'] = 256
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
