"""Runs the demo: pre-train with GreenMIM, detect with Mask R-CNN, report what came out.

Example:
    python tools/demo.py --quick --model swinv2
"""

from greenmim_mm.cli.demo import main

if __name__ == '__main__':
    main()
