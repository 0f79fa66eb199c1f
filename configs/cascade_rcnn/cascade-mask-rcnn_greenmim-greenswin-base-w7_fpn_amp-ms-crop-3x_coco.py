_base_ = [
    '../_base_/models/cascade-mask-rcnn_greenswin-base-w7_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_adamw_3x.py',
    'mmdet::_base_/default_runtime.py',
]
