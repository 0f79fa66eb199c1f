"""Checkpoints can be read and converted without models, and without OpenMMLab."""

import subprocess
import sys

CODE = """
import sys
import greenmim_mm.checkpoint, greenmim_mm.fileio, greenmim_mm.archs
rooms = {name.split('.')[1] for name in sys.modules if name.startswith('greenmim_mm.')}
print(*sorted(rooms), *({'mmengine', 'timm', 'transformers'} & sys.modules.keys()))
"""


def test_checkpoint_imports_nothing_above_it():
    done = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        *('archs', 'checkpoint', 'compat', 'fileio', 'ops', 'plugin', 'text', 'version')
    ]
