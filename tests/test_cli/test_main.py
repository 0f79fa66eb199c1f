"""``greenmim``: help without anything heavy, unknown commands."""

import subprocess
import sys

import pytest

from greenmim_mm.cli.main import COMMANDS, main

# As if torch and all that needs it were not there.
CODE = """
import runpy, sys
for name in ('torch', 'mmengine', 'mmcv', 'mmpretrain', 'timm', 'numpy', 'PIL', 'matplotlib'):
    sys.modules[name] = None
sys.argv = ['greenmim', *sys.argv[1:]]
runpy.run_module('greenmim_mm', run_name='__main__')
"""


def light(*arguments):
    return subprocess.run(
        [sys.executable, '-c', CODE, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    'arguments',
    [
        *([], ['pretrain'], ['export'], ['embed'], ['knn'], ['reconstruct'], ['benchmark']),
        *(['demo'], ['models'], ['train'], ['test'], ['convert'], ['inspect']),
    ],
    ids=' '.join,
)
def test_help_imports_nothing_heavy(arguments):
    result = light(*arguments, '--help')
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(' '.join(['usage: greenmim', *arguments]))


def test_help_names_all_commands():
    text = light('--help').stdout
    assert all(f'\n  {name} ' in text for name in COMMANDS)


def test_models_and_version_need_nothing():
    assert light('--version').stdout.startswith('greenmim 0.')
    lines = light('models').stdout.splitlines()
    assert lines[1].split()[0] == 'swin-tiny'
    assert any(line.startswith('swinv2-large') for line in lines)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [(['pretran'], 'did you mean pretrain?'), (['xyz'], 'there are pretrain, export')],
)
def test_unknown_command_is_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as info:
        main(argv)
    err = capsys.readouterr().err
    assert info.value.code == 2 and err.count('\n') == 1 and message in err


def test_no_command_prints_the_help(capsys):
    with pytest.raises(SystemExit) as info:
        main([])
    assert info.value.code == 2 and 'usage: greenmim COMMAND' in capsys.readouterr().out
