model = dict(
    # Also where another package's config inherits this one, which sets the scope to greenmim_mm.
    _scope_='mmpretrain',
    type='greenmim_mm.GreenMIM',
    mask_ratio=0.75,
    data_preprocessor=dict(
        type='SelfSupDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        type='greenmim_mm.GreenSwin',
        arch='base',
        img_size=224,
        window_size=7,
        # The masked use needs the last stage alone. Norms of other stages would get no gradient,
        # which distributed training refuses.
        out_indices=(3,),
        # Three quarters of the image are gone already.
        drop_path_rate=0.0,
        # As GreenMIM's authors; Swin's own start is a normal distribution cut off at two sigma.
        init_cfg=[
            dict(type='Xavier', distribution='uniform', layer=['Linear', 'Conv2d']),
            dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
        ],
    ),
    neck=dict(
        type='greenmim_mm.GreenMIMPretrainDecoder',
        embed_dim=1024,
        decoder_embed_dim=512,
        decoder_depth=1,
        decoder_num_heads=16,
    ),
    head=dict(
        type='MAEPretrainHead',
        norm_pix=True,
        patch_size=32,
        loss=dict(type='PixelReconstructionLoss', criterion='L2'),
    ),
)
