"""Trains the model of a config: one of this project, of mmpretrain or of mmdet.

Example:
    python tools/train.py configs/custom/greenmim_swin-tiny-w7_1xb128-amp-coslr-100e_custom.py \
        --cfg-options train_dataloader.dataset.data_root=data/photographs
"""

from greenmim_mm.cli.train import main

if __name__ == '__main__':
    main()
