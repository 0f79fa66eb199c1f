"""Imports run one way: no room knows of one that is built on top of it."""

import ast
import graphlib
from pathlib import Path

import pytest

import greenmim_mm

ROOT = Path(greenmim_mm.__file__).parent
# Each line may import from the lines below it, and rooms of one line not from each other.
FLOORS = [
    {'cli'},
    {'demo', 'benchmark', 'visualization'},
    {'verification'},
    {'detectron2', 'engine', 'evaluation'},
    {'datasets'},
    {'models'},
    {'checkpoint'},
    {'ops', 'registry'},
    {'archs', 'extras', 'fileio', 'plugin', 'text', 'version'},
    {'compat'},
]
HEIGHT = {room: len(FLOORS) - floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# A figure of the benchmark and a picture of the demo are drawn by `visualization`.
NEIGHBOURS = {('demo', 'visualization'), ('benchmark', 'visualization')}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix('.py')


def imported_names(path: Path) -> set[str]:
    """What a file imports from this package, anywhere in it, e.g. ``greenmim_mm.ops.masking``."""
    package = ('greenmim_mm', *path.relative_to(ROOT).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*base, *([node.module] if node.module else [])])
            names.update(f'{module}.{alias.name}' for alias in node.names)
    return {name for name in names if name.split('.')[0] == 'greenmim_mm'}


def imported_rooms(path: Path) -> set[str]:
    parts = [name.split('.') for name in imported_names(path)]
    return {part[1] for part in parts if len(part) > 1 and part[1] in HEIGHT}


FILES = sorted(
    path for path in ROOT.rglob('*.py') if path.parent != ROOT or room_of(path) in HEIGHT
)


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in ROOT.rglob('*.py')} - {'__init__', '__main__'}
    assert rooms <= set(HEIGHT), f'{rooms - set(HEIGHT)}: say in FLOORS what may import them'


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = room_of(path)
    for other in imported_rooms(path) - {room}:
        allowed = HEIGHT[other] < HEIGHT[room] or (room, other) in NEIGHBOURS
        assert allowed, f'{path.relative_to(ROOT)} imports {other}, which is built on {room}'


def test_no_circle():
    """Inside rooms modules do not import each other in a circle, either."""
    modules = {
        '.'.join(('greenmim_mm', *path.relative_to(ROOT).with_suffix('').parts)): path
        for path in ROOT.rglob('*.py')
        if path.stem != '__init__'
    }
    graph = {
        module: {
            other
            for name in imported_names(path)
            for other in (name, name.rpartition('.')[0])
            if other in modules
        }
        for module, path in modules.items()
    }
    assert len(graph['greenmim_mm.checkpoint.convert']) > 5
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_ops_needs_torch_and_numpy_alone():
    known = {'torch', 'numpy', 'greenmim_mm'}
    for path in (ROOT / 'ops').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in modules:
                top = module.split('.')[0]
                assert top in known or top in __import__('sys').stdlib_module_names, (path, module)
