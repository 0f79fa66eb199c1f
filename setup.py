"""Packaging of greenmim_mm. `make setup` installs it with all it needs, in editable mode."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Read ``__version__`` without importing the package, whose imports need torch."""
    scope: dict = {}
    exec((ROOT / 'greenmim_mm' / 'version.py').read_text(encoding='utf-8'), scope)
    return scope['__version__']


def read_requirements(name: str) -> list[str]:
    """Read the requirement lines of ``requirements/<name>.txt``."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    stripped = (line.split('#')[0].strip() for line in lines)
    return [line for line in stripped if line]


def read_readme() -> str:
    """Read the long description."""
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.exists() else ''


MAINTAINED = ('maintained', 'segmentation')
OPENMMLAB = ('openmmlab', 'openmmlab-segmentation')
OTHERS = ('demo', 'mim', 'tests', 'docs')
EXTRAS = {name: read_requirements(name) for name in (*MAINTAINED, *OPENMMLAB, *OTHERS)}
# The two OpenMMLab generations exclude each other; `all` takes the default one.
EXTRAS['all'] = [line for name in (*MAINTAINED, *OTHERS) for line in EXTRAS[name]]

# Where MIM and mmengine look for them. No caches, whatever has been run in the clone.
MIM = (
    *('model-index.yml', 'configs/**/*.py', 'configs/**/*.yml', 'configs/**/*.md'),
    # The weights that the demo starts from.
    *('configs/demo/*.pth', 'tools/**/*.py', 'tools/*.sh'),
)

setup(
    name='greenmim-mm',
    version=read_version(),
    description='GreenMIM: masked image modelling for Swin on its visible tokens, for OpenMMLab',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    author='greenmim-mm contributors',
    project_urls={'Paper': 'https://arxiv.org/abs/2205.13515'},
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=['computer vision', 'self-supervised learning', 'masked image modeling', 'swin'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Operating System :: POSIX',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['greenmim_mm', 'greenmim_mm.*']),
    # greenmim_mm/.mim links to recipes and tools; setuptools follows links and packs files.
    package_data={'greenmim_mm': [f'.mim/{pattern}' for pattern in MIM]},
    entry_points={'console_scripts': ['greenmim = greenmim_mm.cli.main:main']},
    python_requires='>=3.10,<3.13',
    install_requires=read_requirements('runtime'),
    extras_require=EXTRAS,
    zip_safe=False,
)
