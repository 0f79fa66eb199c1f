"""``python -m greenmim_mm``: the command ``greenmim``."""

from .cli.main import main

if __name__ == '__main__':
    main(prog='greenmim')
