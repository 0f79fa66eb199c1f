"""Tests of the pure parts of tools/setup_env.py; nothing is installed, nothing downloaded."""

import importlib.util
import sys
import time
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


def make_probe(**changes):
    facts = dict(
        torch_version='2.11.0+cu130',
        cuda_version='13.0',
        capabilities=['90'],
        nvcc_version='13.0',
        python_tag='cp311',
        platform='linux-x86_64',
        python_header='/include/Python.h',
    )
    return setup_env.Probe(**{**facts, **changes})


@pytest.mark.parametrize('version', [(3, 10), (3, 11, 7), (3, 12, 1, 'final', 0)])
def test_check_python_accepts(version):
    setup_env.check_python(version)


@pytest.mark.parametrize('version', [(2, 7), (3, 9, 18), (3, 13, 0), (4, 11)])
def test_check_python_rejects(version):
    with pytest.raises(setup_env.SetupError, match=f'Python {version[0]}.{version[1]} .*PYTHON='):
        setup_env.check_python(version)


def test_parse_requirements():
    text = '# comment\n\ntorch>=2.1  # why\n-r other.txt\nonedl-mmcv==2.3.6\n'
    assert setup_env.parse_requirements(text) == ['torch>=2.1', 'onedl-mmcv==2.3.6']


@pytest.mark.parametrize(
    'requirement, name',
    [('Torch>=2.1', 'torch'), ('scikit_image', 'scikit-image'), ('a.b[x]==1; python<"3"', 'a-b')],
)
def test_requirement_name(requirement, name):
    assert setup_env.requirement_name(requirement) == name


def test_pinned_version():
    requirements = ['torchvision==0.26.0', 'torch==2.11.0', 'timm>=1.0']
    assert setup_env.pinned_version(requirements, 'torch') == '2.11.0'
    with pytest.raises(setup_env.SetupError, match='must pin timm'):
        setup_env.pinned_version(requirements, 'timm')


def test_requirement_files_hold_what_the_script_needs():
    files = {name: REPO / 'requirements' / f'{name}.txt' for name in (*setup_env.STACK, 'build')}
    parsed = {name: setup_env.parse_requirements(path.read_text()) for name, path in files.items()}
    assert all(parsed.values())
    for name in (setup_env.MMCV, *setup_env.TORCH_PAIR):
        assert setup_env.pinned_version(parsed['maintained'], name)
    # `pip install greenmim-mm` must not pull in either OpenMMLab generation.
    names = [setup_env.requirement_name(line) for line in parsed['runtime']]
    assert not [name for name in names if name.startswith(('mm', 'onedl'))]


def test_cache_key_tells_builds_apart():
    facts = ('2.3.6', '2.11.0+cu130', 'cp311', 'linux-x86_64', 'cpu')
    key = setup_env.cache_key(*facts)
    assert key == 'onedl-mmcv-2.3.6_torch-2.11.0+cu130_cp311_linux-x86_64_cpu'
    others = ('2.3.5', '2.11.0', 'cp312', 'linux-aarch64', 'cu130-sm90')
    for index, other in enumerate(others):
        assert setup_env.cache_key(*facts[:index], other, *facts[index + 1 :]) != key


def test_cache_key_is_one_folder_name():
    key = setup_env.cache_key('2.3.6', '2.11.0', 'cp311', 'linux-x86_64', 'cu130-8.0;9.0/x y')
    assert Path(key).name == key
    assert not set(key) & set('; /')


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
        (8, None, {}, 8),
        (2, 4, {'MAX_JOBS': '6'}, 6),
        (2, 4, {'MAX_JOBS': 'many'}, 2),
    ],
)
def test_max_jobs(cores, gigabytes, env, jobs):
    memory = None if gigabytes is None else gigabytes * 1024**3
    assert setup_env.max_jobs(cores, memory, env) == jobs


@pytest.mark.parametrize(
    'line, activity',
    [
        ('  [12/78] c++ -MMD -MF /tmp/x.o.d -c x.cpp', 'compiled 12 of 78 files'),
        ('[78/78] c++ -shared', 'compiled 78 of 78 files'),
        ('  Downloading torch-2.11.0-cp311.whl (530.2 MB)', 'downloading torch-2.11.0-cp311.whl'),
        ('  Downloading a/b/timm-1.0.31.whl.metadata (3 kB)', 'downloading timm-1.0.31.whl (3 kB)'),
        ('Installing collected packages: torch, torchvision', 'unpacking'),
        ('  g++ -pthread -shared a.o b.o -o build/lib/mmcv/_ext.cpython-311.so', 'linking'),
    ],
)
def test_describe_activity(line, activity):
    assert setup_env.describe_activity(line).startswith(activity)


@pytest.mark.parametrize(
    'line', ['', 'Collecting torch', '[notice] pip', 'array[1/2] = 3', 'copying mmcv/_ext.py']
)
def test_describe_activity_ignores_other_lines(line):
    assert setup_env.describe_activity(line) is None


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


def test_store_and_find_cached_wheel(tmp_path, capsys):
    wheel = write_wheel(tmp_path / 'mmcv.whl', ['mmcv/_ext.so'])
    folder = tmp_path / 'cache' / 'key'
    stored = setup_env.store_wheel(wheel, folder)
    console = setup_env.Console(time.monotonic())
    assert stored.read_bytes() == wheel.read_bytes()
    assert [path.name for path in folder.iterdir()] == ['mmcv.whl']
    assert setup_env.cached_wheel(folder, console) == stored

    stored.write_bytes(b'half a wh')
    assert setup_env.cached_wheel(folder, console) is None
    assert not stored.exists()
    assert 'damaged' in capsys.readouterr().out


@pytest.fixture
def tree(tmp_path):
    """A small repository with the files that the stamp covers."""
    (tmp_path / 'requirements').mkdir()
    (tmp_path / 'greenmim_mm').mkdir()
    (tmp_path / 'requirements' / 'runtime.txt').write_text('torch>=2.1\n')
    (tmp_path / 'requirements' / 'maintained.txt').write_text('torch==2.11.0\n')
    (tmp_path / 'setup.py').write_text('setup()\n')
    (tmp_path / 'greenmim_mm' / 'version.py').write_text('__version__ = "0.1.0"\n')
    return tmp_path


def test_stamp_is_stable(tree):
    (tree / 'README.md').write_text('not covered')
    before = setup_env.stamp_digest(tree, '3.11.7')
    (tree / 'README.md').write_text('changed')
    assert setup_env.stamp_digest(tree, '3.11.7') == before


@pytest.mark.parametrize(
    'name', ['requirements/runtime.txt', 'requirements/maintained.txt', 'setup.py']
)
def test_stamp_follows_files(tree, name):
    before = setup_env.stamp_digest(tree, '3.11.7')
    (tree / name).write_text('changed\n')
    assert setup_env.stamp_digest(tree, '3.11.7') != before


def test_stamp_follows_new_file_and_python_and_script(tree, monkeypatch):
    before = setup_env.stamp_digest(tree, '3.11.7')
    assert setup_env.stamp_digest(tree, '3.12.1') != before
    monkeypatch.setattr(setup_env, 'SCRIPT_VERSION', -1)
    assert setup_env.stamp_digest(tree, '3.11.7') != before
    monkeypatch.undo()
    (tree / 'requirements' / 'extra.txt').write_text('x\n')
    assert setup_env.stamp_digest(tree, '3.11.7') != before


def test_find_compiler():
    found = {'g++': '/usr/bin/g++', 'ccache': '/usr/bin/ccache'}.get
    assert setup_env.find_compiler({}, found) == 'g++'
    assert setup_env.find_compiler({'CXX': 'ccache g++'}, found) == 'ccache g++'


@pytest.mark.parametrize('env, tried', [({}, r'c\+\+, g\+\+'), ({'CXX': 'icpx'}, 'CXX=icpx')])
def test_missing_compiler_names_the_remedy(env, tried):
    with pytest.raises(setup_env.SetupError, match=tried) as error:
        setup_env.find_compiler(env, lambda name: None)
    assert 'apt-get install g++' in str(error.value)
    assert 'make setup again' in str(error.value)


def test_cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert setup_env.cache_root({}) == tmp_path / '.cache' / 'greenmim_mm'
    assert setup_env.cache_root({'GREENMIM_MM_CACHE': str(tmp_path / 'c')}) == tmp_path / 'c'


@pytest.mark.parametrize(
    'output, expected',
    [
        ('WARNING: Retrying (Retry(total=4)) after connection broken by NewConnectionError', True),
        ('ERROR: HTTP error 503 while getting x', True),
        ("pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool: timed out.'", True),
        ('ERROR: No matching distribution found for torch==99', False),
        ('error: command g++ failed with exit code 1', False),
    ],
)
def test_is_network_failure(output, expected):
    assert setup_env.is_network_failure(output) is expected


@pytest.mark.parametrize(
    'output, remedy',
    [
        ('OSError: [Errno 28] No space left on device', '6 GB'),
        ('g++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('Connection refused', 'proxy'),
    ],
)
def test_failure_hint(output, remedy):
    assert remedy in setup_env.failure_hint(output)
    assert setup_env.failure_hint('error: invalid syntax') == ''


def test_venv_python_version(tmp_path):
    assert setup_env.venv_python_version(tmp_path) is None
    (tmp_path / 'pyvenv.cfg').write_text('home = /usr/bin\nversion = 3.11.7\n')
    assert setup_env.venv_python_version(tmp_path) is None
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').touch()
    assert setup_env.venv_python_version(tmp_path) == '3.11.7'
    (tmp_path / 'bin' / 'python').unlink()
    (tmp_path / 'bin' / 'python').symlink_to(tmp_path / 'removed')
    assert setup_env.venv_python_version(tmp_path) is None


def test_run_command_reports_and_returns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(setup_env, 'REPORT_SECONDS', 0.0)
    monkeypatch.setattr(setup_env, 'ROOT', tmp_path)
    code = "import time; print('[3/9] c++ x', flush=True); time.sleep(0.5); raise SystemExit(7)"
    console = setup_env.Console(time.monotonic())
    log = tmp_path / 'log'
    log.write_text('earlier output\n')
    status, output = setup_env.run_command([sys.executable, '-c', code], 'building', log, console)
    assert (status, output) == (7, '[3/9] c++ x\n')
    assert log.read_text().startswith('earlier output\n')
    assert 'building: compiled 3 of 9 files, 0 s so far, log log' in capsys.readouterr().out
