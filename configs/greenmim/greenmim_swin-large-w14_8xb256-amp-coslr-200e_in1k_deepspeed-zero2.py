_base_ = [
    './greenmim_swin-large-w14_8xb256-amp-coslr-200e_in1k.py',
    '../_base_/strategies/deepspeed_zero2.py',
]

optim_wrapper = dict(type='DeepSpeedOptimWrapper')
