"""Converts checkpoints of Swin between libraries, and says what a checkpoint is.

The same as ``greenmim convert`` and ``greenmim inspect``.

Examples:
    python tools/convert_checkpoint.py work_dirs/greenmim/epoch_200.pth swin.pth --to mmdet
    python tools/convert_checkpoint.py inspect swin.pth
"""

from greenmim_mm.cli.convert import main

if __name__ == '__main__':
    main()
