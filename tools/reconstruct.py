"""Draws original, masked and painted-back images of a GreenMIM pre-training as one PNG.

Example:
    python tools/reconstruct.py CONFIG work_dirs/greenmim/epoch_200.pth photos/ --out painted.png
"""

from greenmim_mm.cli.reconstruct import main

if __name__ == '__main__':
    main()
