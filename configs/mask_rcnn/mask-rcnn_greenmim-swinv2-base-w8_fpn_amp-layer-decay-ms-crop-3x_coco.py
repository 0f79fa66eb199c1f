_base_ = [
    '../_base_/models/mask-rcnn_greenswinv2-base-w8_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_adamw_layer-decay_3x.py',
    'mmdet::_base_/default_runtime.py',
]
