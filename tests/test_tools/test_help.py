"""``--help`` of the tools, which must be quick: nothing heavy is imported for it."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
# The study's command line reads its design, which names the scenes' constants: numpy is needed.
ANALYSES = sorted(
    {f'analysis/{path.name}' for path in TOOLS.glob('analysis/*.py')} - {'analysis/evidence.py'}
)
# As if torch and all that needs it were not there.
CODE = """
import runpy, sys
for name in ('torch', 'mmengine', 'mmcv', 'timm', 'matplotlib', 'skimage', 'numpy'):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize(
    'arguments',
    [
        *(['train.py'], ['test.py'], ['reconstruct.py'], ['benchmark.py'], ['setup_env.py']),
        *(['benchmark.py', name] for name in ('pretrain', 'grouping', 'dense')),
        *([name] for name in ANALYSES),
    ],
    ids='-'.join,
)
def test_help_imports_nothing_heavy(arguments):
    tool, *command = arguments
    result = subprocess.run(
        [sys.executable, '-c', CODE, str(TOOLS / tool), *command, '--help'],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f'usage: {Path(tool).name}')
