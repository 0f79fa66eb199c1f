"""What has a name: architectures, and formats of checkpoints. Data alone, quick to import.

Huge and giant are mmpretrain's: Microsoft published neither code nor weights of them.
"""

SWIN_ARCHS = {
    'tiny': dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'small': dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'base': dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'large': dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}
"""Swin V1: channels of the first stage, blocks and attention heads of each stage."""

SWINV2_ARCHS = {name: dict(arch, extra_norm_every_n_blocks=0) for name, arch in SWIN_ARCHS.items()}
"""Swin V2: besides, every n-th block of a stage ends with one more norm (0: none does)."""

SWINV2_ARCHS['huge'] = dict(
    embed_dims=352, depths=(2, 2, 18, 2), num_heads=(8, 16, 32, 64), extra_norm_every_n_blocks=6
)
SWINV2_ARCHS['giant'] = dict(
    embed_dims=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128), extra_norm_every_n_blocks=6
)

FORMAT_NAMES = {
    'greenmim_mm': 'this package: GreenMIM pre-training (backbone and decoder) and what follows it',
    'mmdet': "backbone of a detector, for mmdet.SwinTransformer's init_cfg",
    'mmpretrain': (
        'classifier, backbone or SimMIM of mmpretrain.SwinTransformer and SwinTransformerV2'
    ),
    'greenmim': "the GreenMIM authors' pre-training files",
    'microsoft': "Microsoft's Swin-Transformer: classifiers and SimMIM",
    'timm': 'swin_* and swinv2_* of timm',
    'huggingface': 'Swin* and Swinv2* models of transformers',
    'torchvision': 'swin_t, swin_s, swin_b and swin_v2_* of torchvision',
    'detectron2': "Swin of detectron2's ViTDet project",
}
"""Formats of checkpoints, and what each is for; :mod:`greenmim_mm.checkpoint` knows the rest."""
