"""The architectures that have a name; data alone, for models, checkpoints and benchmarks.

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
