"""Measures GreenMIM against its peers: speed and memory, on this machine, in one run.

Examples:
    python tools/benchmark.py
    python tools/benchmark.py --models '*-base*' --repeats 7 --json base.json
    python tools/benchmark.py traffic --models '*-base*' --roofline H100 A100
"""

import sys

from greenmim_mm.cli.benchmark import main

if __name__ == '__main__':
    sys.exit(main())
