"""Classifies images by their nearest neighbours in the features of a checkpoint, as pre-trained.

Example:
    python tools/knn.py work_dirs/greenmim/epoch_200.pth data/imagenet/train data/imagenet/val
"""

from greenmim_mm.cli.knn import main

if __name__ == '__main__':
    main()
