_base_ = [
    '../_base_/models/upernet_greenswin-base-w7.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/ade20k_adamw_160k.py',
    '../_base_/segmentation_runtime.py',
]

from greenmim_mm.extras import need  # noqa: E402

need('mmseg', 'segmentation')
