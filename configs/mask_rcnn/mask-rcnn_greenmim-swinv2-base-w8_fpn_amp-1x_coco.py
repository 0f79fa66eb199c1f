_base_ = [
    '../_base_/models/mask-rcnn_greenswinv2-base-w8_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]
