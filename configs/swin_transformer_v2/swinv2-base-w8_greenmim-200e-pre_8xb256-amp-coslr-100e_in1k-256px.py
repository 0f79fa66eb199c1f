# Ours, not a paper's: GreenMIM on Swin V2, fine-tuned as SimMIM's Swin V2 at its own size.
_base_ = './swinv2-base-w14_simmim-800e-pre_8xb256-amp-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        img_size=256,
        window_size=8,
        pretrained_window_sizes=(0, 0, 0, 0),
        init_cfg=dict(
            checkpoint='work_dirs/greenmim_swinv2-base-w8_8xb256-amp-coslr-200e_in1k-256px/epoch_200.pth'
        ),
    )
)

train_pipeline = _base_.train_pipeline
train_pipeline[1]['scale'] = 256  # RandomResizedCrop
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

# The same share of the image as 224 of 256 pixels.
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = 292  # ResizeEdge
test_pipeline[2]['crop_size'] = 256  # CenterCrop
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
