"""tools/setup_env.py with stand-ins: nothing is installed, nothing downloaded."""

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location('setup_env', REPO / 'tools' / 'setup_env.py')
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


setup_env = load_script()
MAINTAINED, OPENMMLAB = (setup_env.STACKS[name] for name in ('maintained', 'openmmlab'))


def make_probe(**changes):
    facts = dict(
        torch_version='2.11.0+cu130',
        cuda_version='13.0',
        capabilities=['90'],
        nvcc_version='13.0',
        python_tag='cp311',
        platform='linux-x86_64',
        python_header='/include/Python.h',
        memory=4 * 1024**3,
    )
    return setup_env.Probe(**{**facts, **changes})


@pytest.mark.parametrize('version', [(3, 10), (3, 11, 7), (3, 12, 1, 'final', 0)])
def test_check_python_accepts(version):
    setup_env.check_python(version, MAINTAINED, '')


@pytest.mark.parametrize('version', [(2, 7), (3, 9, 18), (3, 13, 0), (4, 11)])
def test_check_python_rejects(version):
    with pytest.raises(setup_env.SetupError, match=f'Python {version[0]}.{version[1]} .*Name one'):
        setup_env.check_python(version, MAINTAINED, 'Name one')


def test_upstream_stack_ends_at_python_311():
    setup_env.check_python((3, 11), OPENMMLAB, '')
    with pytest.raises(setup_env.SetupError, match=r'stack openmmlab: 3.10 to 3.11 is needed'):
        setup_env.check_python((3, 12), OPENMMLAB, '')


def test_pinned():
    requirements = '# torch==1\ntorchvision==0.26.0\ntorch==2.11.0  # why\ntimm>=1.0\n'
    assert setup_env.pinned(requirements, 'torch') == 'torch==2.11.0'
    with pytest.raises(setup_env.SetupError, match='must pin timm'):
        setup_env.pinned(requirements, 'timm')


@pytest.mark.parametrize('stack', [MAINTAINED, OPENMMLAB])
def test_requirement_files_hold_what_the_script_needs(stack):
    pins = (REPO / 'requirements' / f'{stack.name}.txt').read_text()
    for name in (stack.mmcv, 'torch', 'torchvision'):
        assert setup_env.pinned(pins, name)
    # `pip install greenmim-mm` must not pull in either OpenMMLab generation.
    assert not re.search(r'^(mm|onedl)', (REPO / 'requirements/runtime.txt').read_text(), re.M)


def key(mmcv='onedl-mmcv==2.3.6', device='cpu', **changes):
    env = {'GREENMIM_MM_CACHE': '/cache'}
    folder = setup_env.cache_folder(mmcv, make_probe(**changes), device, env)
    assert folder.parent == Path('/cache')
    return folder.name


def test_cache_key_tells_builds_apart():
    assert key() == 'onedl-mmcv-2.3.6_torch-2.11.0+cu130_cp311_linux-x86_64_cpu'
    others = (
        *(key('onedl-mmcv==2.3.5'), key('mmcv==2.3.6'), key(torch_version='2.11.0')),
        *(key(python_tag='cp312'), key(platform='linux-aarch64'), key(device='cu130-sm90')),
    )
    assert len({key(), *others}) == 7
    assert not set(key(device='cu130-8.0;9.0/x y')) & set('; /')


@pytest.mark.parametrize(
    'changes, env, device, note',
    [
        ({}, {}, 'cu130-sm90', ''),
        (dict(capabilities=['80', '90']), {}, 'cu130-sm80-sm90', ''),
        (dict(capabilities=[]), {}, 'cpu', ''),
        (dict(capabilities=[], nvcc_version=''), {}, 'cpu', ''),
        ({}, {'FORCE_CUDA': '0'}, 'cpu', ''),
        ({}, {'TORCH_CUDA_ARCH_LIST': '8.0;9.0'}, 'cu130-8.0;9.0', ''),
        (dict(capabilities=[]), {'FORCE_CUDA': '1'}, 'cu130-default', ''),
        (dict(nvcc_version=''), {}, 'cpu', 'no CUDA compiler'),
        (dict(nvcc_version='12.8'), {}, 'cpu', 'nvcc is 12.8 while torch is for CUDA 13.0'),
        (dict(nvcc_version='13.2'), {}, 'cu130-sm90', ''),
    ],
)
def test_choose_device(changes, env, device, note):
    found, told = setup_env.choose_device(make_probe(**changes), env)
    assert found == device
    assert note in told if note else told == ''


@pytest.mark.parametrize('changes', [dict(nvcc_version=''), dict(cuda_version='')])
def test_choose_device_refuses_impossible_force(changes):
    with pytest.raises(setup_env.SetupError, match='FORCE_CUDA=1'):
        setup_env.choose_device(make_probe(**changes), {'FORCE_CUDA': '1'})


@pytest.mark.parametrize(
    'cores, gigabytes, env, jobs',
    [
        (2, 22, {}, 2),
        (16, 9, {}, 4),
        (8, 1, {}, 1),
        (2, 4, {'MAX_JOBS': '6'}, 6),
        (2, 4, {'MAX_JOBS': 'many'}, 2),
        (2, 4, {'MAX_JOBS': '0'}, 2),
    ],
)
def test_max_jobs(cores, gigabytes, env, jobs):
    assert setup_env.max_jobs(cores, gigabytes * 1024**3, env) == jobs


def write_wheel(path, names):
    with zipfile.ZipFile(path, 'w') as wheel:
        for name in names:
            wheel.writestr(name, 'content ' * 50)
    return path


@pytest.mark.parametrize(
    'names, expected',
    [
        (['mmcv/__init__.py', 'mmcv/_ext.cpython-311-x86_64-linux-gnu.so'], True),
        (['mmcv/__init__.py', 'mmcv/_ext.pyd'], True),
        (['mmcv/__init__.py', 'mmcv/ops/nms.py'], False),
        (['other/_ext.so', 'mmcv/_extra/x.so', 'mmcv/_ext.py'], False),
    ],
)
def test_wheel_has_ops(tmp_path, names, expected):
    assert setup_env.wheel_has_ops(write_wheel(tmp_path / 'a.whl', names)) is expected


def test_wheel_has_ops_rejects_damage(tmp_path):
    wheel = write_wheel(tmp_path / 'a.whl', ['mmcv/_ext.so'])
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[: len(whole) // 2])
    assert not setup_env.wheel_has_ops(wheel)
    wheel.write_bytes(whole.replace(b'content', b'c0ntent', 1))
    assert not setup_env.wheel_has_ops(wheel)
    assert not setup_env.wheel_has_ops(tmp_path / 'missing.whl')


def test_find_compiler(tmp_path):
    for name in ('g++', 'ccache'):
        (tmp_path / name).touch(0o755)
    env = {'PATH': str(tmp_path)}
    assert setup_env.find_compiler(env) == 'g++'
    assert setup_env.find_compiler({'CXX': 'ccache g++', **env}) == 'ccache g++'


@pytest.mark.parametrize('env, tried', [({}, r'c\+\+, g\+\+'), ({'CXX': 'icpx'}, 'tried icpx')])
def test_missing_compiler_names_the_remedy(tmp_path, env, tried):
    with pytest.raises(setup_env.SetupError, match=tried) as error:
        setup_env.find_compiler({'PATH': str(tmp_path), **env})
    assert 'apt-get install g++' in str(error.value)
    assert 'make setup again' in str(error.value)


def test_cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    folder = setup_env.cache_folder('mmcv==2', make_probe(), 'cpu', {})
    assert folder.parent == tmp_path / '.cache' / 'greenmim_mm'


@pytest.mark.parametrize(
    'output, remedy',
    [
        ('OSError: [Errno 28] No space left on device', '6 GB'),
        ('g++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('Connection refused', 'proxy'),
        ('WARNING: Retrying (Retry(total=4)) after NewConnectionError', 'proxy'),
        ('ERROR: HTTP error 503 while getting x', 'proxy'),
        ("ReadTimeoutError: HTTPSConnectionPool: timed out.'", 'proxy'),
    ],
)
def test_failure_hint(output, remedy):
    assert remedy in setup_env.failure_hint(output)
    for other in ('error: invalid syntax', 'No matching distribution found for torch==99'):
        assert setup_env.failure_hint(other) == ''


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small repository with the files that the stamp covers, and its environment."""
    for name, text in {
        'requirements/runtime.txt': 'numpy\n',
        'requirements/maintained.txt': 'torch==2.11.0\ntorchvision==0.26\nonedl-mmcv==2.3.6\n',
        'requirements/build.txt': 'ninja\n',
        'setup.py': 'setup()\n',
        'greenmim_mm/version.py': '__version__ = "0.1.0"\n',
        '.venv/pyvenv.cfg': 'version = 3.11.7\n',
        '.venv/bin/python': '',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(setup_env, 'ROOT', tmp_path)
    return tmp_path


@pytest.fixture
def stamped(tree):
    venv = setup_env.Environment(tree / '.venv', MAINTAINED)
    assert not venv.is_up_to_date()
    venv.stamp.write_text(venv.digest())
    assert venv.is_up_to_date()
    return venv


def test_stamp_is_stable(tree, stamped, capsys):
    (tree / 'README.md').write_text('not covered')
    assert setup_env.main([]) == 0
    assert capsys.readouterr().out == 'environment up to date\n'


@pytest.mark.parametrize(
    'name',
    ['requirements/runtime.txt', 'requirements/new.txt', 'setup.py', '.venv/pyvenv.cfg'],
)
def test_stamp_follows_files(tree, stamped, name):
    (tree / name).write_text('changed\n')
    assert not stamped.is_up_to_date()


def test_stamp_follows_stack_and_script_and_python(tree, stamped, monkeypatch):
    assert not setup_env.Environment(tree / '.venv', OPENMMLAB).is_up_to_date()
    with monkeypatch.context() as patch:
        patch.setattr(setup_env, 'SCRIPT_VERSION', -1)
        assert not stamped.is_up_to_date()
    stamped.python.unlink()
    stamped.python.symlink_to(tree / 'removed')
    assert not stamped.is_up_to_date()


# Stands for the environment's Python: writes down what it is asked, and plays pip and imports.
PLAYER = """#!{python}
import json, os, pathlib, sys, zipfile
root = pathlib.Path({root!r})
arguments = sys.argv[1:]
with open(root / 'calls', 'a') as calls:
    calls.write(json.dumps(arguments) + chr(10))
if (root / 'fail').exists() and (root / 'fail').read_text() in ' '.join(arguments):
    sys.exit('g++: fatal error: Killed signal terminated program cc1plus')
if 'PROBE' in arguments[-1]:
    print('PROBE' + json.dumps({probe!r}))
elif 'version_info' in arguments[-1]:
    print('3 11')
elif 'wheel' in arguments:
    wheel = pathlib.Path(arguments[arguments.index('--wheel-dir') + 1]) / 'mmcv.whl'
    with zipfile.ZipFile(wheel, 'w') as file:
        file.writestr('mmcv/_ext.so', os.environ['MMCV_WITH_OPS'])
"""


@pytest.fixture
def stage(tree, monkeypatch):
    """The small repository, with a stand-in for the environment's Python, and an empty cache."""
    probe = vars(make_probe(capabilities=[], python_header=str(tree / 'setup.py')))
    python = tree / '.venv/bin/python'
    python.write_text(PLAYER.format(python=sys.executable, root=str(tree), probe=probe))
    python.chmod(0o755)
    (tree / 'bin').mkdir()
    (tree / 'bin/g++').touch(0o755)
    monkeypatch.setenv('PATH', f'{tree}/bin')
    monkeypatch.setenv('GREENMIM_MM_CACHE', str(tree / 'cache'))
    monkeypatch.delenv('CXX', raising=False)
    return tree


def called(stage, what):
    lines = (stage / 'calls').read_text().splitlines()
    (stage / 'calls').unlink()
    return sum(what in line for line in lines)


def wheels(stage):
    return list(stage.glob('cache/*/*'))


def test_all_steps_then_none_then_those_of_a_change(stage, capsys):
    assert setup_env.main([]) == 0
    assert called(stage, '"wheel"') == 1
    folder = stage / 'cache/onedl-mmcv-2.3.6_torch-2.11.0+cu130_cp311_linux-x86_64_cpu'
    assert set(wheels(stage)) == {folder / 'lock', folder / 'mmcv.whl'}
    assert 'environment ready' in capsys.readouterr().out

    assert setup_env.main([]) == 0
    assert not (stage / 'calls').exists()

    (stage / 'requirements/runtime.txt').write_text('numpy<3\n')
    assert setup_env.main([]) == 0
    assert called(stage, '"wheel"') == 0  # from the cache

    (folder / 'mmcv.whl').write_bytes(b'half a wh')
    assert setup_env.main(['--force']) == 0
    assert called(stage, '"wheel"') == 1
    assert setup_env.wheel_has_ops(folder / 'mmcv.whl')


def test_failed_build_leaves_nothing_and_says_why(stage, capsys):
    (stage / 'fail').write_text('wheel --no-build-isolation')
    assert setup_env.main([]) == 1
    error = capsys.readouterr().err
    assert 'compiling onedl-mmcv==2.3.6 for cpu' in error and 'MAX_JOBS=1' in error
    assert '  | g++: fatal error' in error and f'{stage}/.venv/setup.log' in error
    assert [path.name for path in wheels(stage)] == ['lock']
    assert not (stage / '.venv/setup.stamp').exists()


def test_operators_that_do_not_load_are_dropped(stage, capsys):
    (stage / 'fail').write_text('from mmcv.ops import')
    assert setup_env.main([]) == 1
    assert 'mmcv.whl was removed: make setup compiles it again' in capsys.readouterr().err
    assert [path.name for path in wheels(stage)] == ['lock']


def test_a_fault_of_other_packages_costs_no_wheel(stage, capsys):
    (stage / 'fail').write_text('-c import mmcv')
    assert setup_env.main([]) == 1
    assert 'importing mmcv failed' in capsys.readouterr().err
    assert sorted(path.name for path in wheels(stage)) == ['lock', 'mmcv.whl']


def test_folder_that_is_no_environment_is_left_alone(stage, capsys):
    (stage / '.venv/pyvenv.cfg').unlink()
    assert setup_env.main([]) == 1
    assert 'is no virtual environment; move it away' in capsys.readouterr().err
    assert (stage / '.venv/bin/python').exists()


@pytest.mark.parametrize('stack', ['maintained', 'openmmlab'])
def test_make_and_script_agree_on_the_environment(stack, tree, monkeypatch):
    command = ['make', '-n', 'test', f'STACK={stack}', f'PYTHON={sys.executable}']
    told = subprocess.run(command, cwd=REPO, env=os.environ, capture_output=True, text=True)
    monkeypatch.setattr(setup_env, 'set_up', lambda venv: None)
    monkeypatch.setattr(setup_env, 'check_python', lambda *args: None)
    made = []
    monkeypatch.setattr(setup_env.Environment, 'is_up_to_date', lambda venv: made.append(venv))
    setup_env.main(['--stack', stack])
    folder = made[0].folder.relative_to(tree)
    assert f' {folder}/bin/python -m pytest' in told.stdout, told
