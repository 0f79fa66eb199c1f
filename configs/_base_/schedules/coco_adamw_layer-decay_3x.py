# The learning rate falls by layer_decay_rate from each layer of the backbone to the one below it.
_base_ = './coco_adamw_3x.py'

optim_wrapper = dict(
    constructor='greenmim_mm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.9),
)
