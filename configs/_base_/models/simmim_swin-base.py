# The windows and the image size are the recipe's: its authors pre-train with 6 at 192 pixels.
model = dict(
    # Also where another package's config inherits this one, which sets the scope to greenmim_mm.
    _scope_='mmpretrain',
    type='SimMIM',
    data_preprocessor=dict(
        type='SelfSupDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(type='SimMIMSwinTransformer', arch='base', drop_path_rate=0.0),
    neck=dict(type='SimMIMLinearDecoder', in_channels=128 * 8, encoder_stride=32),
    head=dict(
        type='SimMIMHead',
        patch_size=4,
        loss=dict(type='PixelReconstructionLoss', criterion='L1', channel=3),
    ),
)
