_base_ = './greenmim_swin-tiny-w7_8xb256-amp-coslr-100e_in1k.py'

model = dict(backbone=dict(arch='small'))
