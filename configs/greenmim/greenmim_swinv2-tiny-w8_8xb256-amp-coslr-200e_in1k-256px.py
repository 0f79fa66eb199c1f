_base_ = './greenmim_swinv2-base-w8_8xb256-amp-coslr-200e_in1k-256px.py'

model = dict(backbone=dict(arch='tiny'), neck=dict(embed_dim=768))
