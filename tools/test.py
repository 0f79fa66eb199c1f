"""Evaluates a checkpoint with a config: one of this project, of mmpretrain or of mmdet.

Example:
    python tools/test.py \
        configs/mask_rcnn/mask-rcnn_greenmim-swin-base-w7_fpn_amp-ms-crop-3x_coco.py \
        work_dirs/mask-rcnn_greenmim-swin-base-w7_fpn_amp-ms-crop-3x_coco/epoch_36.pth
"""

from greenmim_mm.cli.test import main

if __name__ == '__main__':
    main()
