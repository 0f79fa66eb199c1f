# As mask-rcnn_greenmim-swin-base-w7_..., with the backbone of this package: it computes the same,
# takes checkpoints of any window size and refuses one that does not fit.
_base_ = [
    '../_base_/models/mask-rcnn_greenswin-base-w7_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_adamw_3x.py',
    'mmdet::_base_/default_runtime.py',
]
