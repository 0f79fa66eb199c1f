"""The wheel: what it carries, and that it is enough, in an empty folder and without the clone."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ('configs', 'tools', 'greenmim_mm', 'requirements')
FILES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'model-index.yml')
HEAVY = ('torch', 'numpy', 'mmengine', 'mmcv', 'timm', 'PIL', 'yaml')


def run(*arguments, **settings):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, **settings
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of what packages are made of: building leaves files beside it. One has been used."""
    folder = tmp_path_factory.mktemp('source')
    for part in PARTS:
        ignored = shutil.ignore_patterns('__pycache__', '*.so')
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy2(ROOT / name, folder)
    for part in PARTS[:3]:
        (folder / part / '__pycache__').mkdir()
        (folder / part / '__pycache__/used.cpython-311.pyc').touch()
    return folder


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    """Built without isolation, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp('dist')
    options = ('--no-build-isolation', '--no-deps', '--no-index', '--wheel-dir', folder)
    run('-m', 'pip', 'wheel', *options, source)
    (path,) = folder.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    run(
        '-m', 'pip', 'install', '--no-deps', '--no-index', '--no-compile', '--target', folder, wheel
    )
    return folder


@pytest.fixture(scope='module')
def python(site, tmp_path_factory):
    """Runs Python on code, in an empty folder where only the wheel is installed."""

    def call(code, *options):
        env = dict(os.environ, PYTHONPATH=str(site), OMP_NUM_THREADS='1')
        return run(*options, '-c', code, cwd=tmp_path_factory.mktemp('empty'), env=env)

    return call


def carried(names):
    """Recipes, tools and the index among the names of an archive."""
    marker = 'greenmim_mm/.mim/'
    return {name.partition(marker)[2] for name in names if marker in name and name[-1] != '/'}


def expected():
    suffixes = ('.py', '.sh', '.yml', '.md', '.pth')
    files = (path for part in PARTS[:2] for path in (ROOT / part).rglob('*'))
    return {
        'model-index.yml',
        *(str(path.relative_to(ROOT)) for path in files if path.suffix in suffixes),
    }


def test_wheel_carries_recipes_tools_and_index(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert carried(names) == expected()
    assert not [name for name in names if 'pycache' in name or name.startswith(('tests', 'docs'))]


def test_sdist_carries_the_same(source, tmp_path):
    run('setup.py', '-q', 'sdist', '-d', tmp_path, cwd=source)
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert carried(member.name for member in members if member.isfile()) == expected()
    # A link would lead nowhere once unpacked.
    assert all(member.isfile() or member.isdir() for member in members)
    requirements = {f'requirements/{file.name}' for file in (ROOT / 'requirements').glob('*.txt')}
    assert requirements <= {member.name.partition('/')[2] for member in members}


def test_metadata(site):
    (info,) = site.glob('*.dist-info')
    distribution = Distribution.at(info)
    metadata = distribution.metadata
    assert metadata['Name'] == 'greenmim-mm' and metadata['License'] == 'Apache-2.0'
    assert set(metadata.get_all('Provides-Extra')) >= {'maintained', 'openmmlab', 'mim', 'demo'}
    scripts = distribution.entry_points.select(group='console_scripts')
    assert {script.name: script.value for script in scripts} == {
        'greenmim': 'greenmim_mm.cli.main:main'
    }


def test_import_is_light(python):
    told = python(
        f'import sys, greenmim_mm; print([name for name in {HEAVY} if name in sys.modules])'
    )
    assert told.strip() == '[]'


def test_console_script_resolves(python):
    told = python(
        'from importlib.metadata import entry_points\n'
        "(script,) = entry_points(group='console_scripts', name='greenmim')\n"
        'print(callable(script.load()))'
    )
    assert told.strip() == 'True'


RECIPES = """
import json, pathlib, sys
import greenmim_mm
from mmengine.config import Config
from mmengine.hub import get_config
package = pathlib.Path(greenmim_mm.__file__).parent
recipe = 'greenmim_mm::greenmim/greenmim_swin-tiny-w7_8xb256-amp-coslr-100e_in1k.py'
pathlib.Path('mine.py').write_text(f"_base_ = '{recipe}'\\ntrain_cfg = dict(max_epochs=3)\\n")
mine = Config.fromfile('mine.py')
import mmpretrain
from mmengine.registry import DATASETS, MODELS
from PIL import Image
pathlib.Path('images').mkdir()
Image.new('RGB', (300, 200)).save('images/image.png')
mine.train_dataloader.dataset.update(data_root='images', data_prefix='')
image = DATASETS.build(mine.train_dataloader.dataset)[0]['inputs']
head = type(MODELS.build(mine.model).head).__name__
model = mmpretrain.get_model('greenmim_swin-tiny-w7_8xb256-amp-coslr-100e_in1k')
print(json.dumps(dict(
    package=str(package),
    type=get_config(recipe).model.type,
    mine=[mine.model.type, mine.model.backbone.arch, mine.train_cfg.max_epochs],
    image=list(image.shape),
    head=head,
    tools=(package / '.mim/tools/train.py').is_file(),
    listed=mmpretrain.list_models('greenmim*') + mmpretrain.list_models('*greenmim-mm'),
    parameters=sum(value.numel() for value in model.parameters()),
    finders=[type(finder).__name__ for finder in sys.meta_path],
)))
"""


def test_libraries_find_the_recipes(python, site):
    told = json.loads(python(RECIPES).splitlines()[-1])
    assert told['package'] == str(site / 'greenmim_mm') and told['tools']
    assert told['type'] == 'greenmim_mm.GreenMIM'
    assert told['mine'] == ['greenmim_mm.GreenMIM', 'tiny', 3]
    # Names of mmpretrain are found where a config inherits from the package by name.
    assert told['image'] == [3, 224, 224] and told['head'] == 'MAEPretrainHead'
    own = {path.stem for path in (ROOT / 'configs/greenmim').glob('*.py')}
    assert len(told['listed']) == len(set(told['listed'])) > 10
    assert {name for name in told['listed'] if name.startswith('greenmim')} <= own
    assert 'simmim_swin-base-w6_8xb256-amp-coslr-100e_in1k-192px_greenmim-mm' in told['listed']
    assert told['parameters'] == 32642938  # as its metafile says
    assert '_Waiting' not in told['finders']


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_tools_run_from_the_wheel(tool, site, python):
    path = site / f'greenmim_mm/.mim/tools/{tool}.py'
    code = (
        f"import runpy, sys; sys.argv[1:] = ['-h']; runpy.run_path({str(path)!r}, None, '__main__')"
    )
    assert 'usage:' in python(code)
