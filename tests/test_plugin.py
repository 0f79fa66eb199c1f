"""Libraries learn of the package when they are imported, in whichever order."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from greenmim_mm import plugin


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A module that can be imported, and a listener that writes down what it is told."""
    (tmp_path / 'some_library').mkdir()
    (tmp_path / 'some_library/__init__.py').write_text('')
    (tmp_path / 'some_library/tables.py').write_text('TABLE = {}\n')
    told = []
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugin, '_LISTENERS', {'some_library.tables': told.append})
    monkeypatch.setattr(sys, 'meta_path', list(sys.meta_path))
    yield told
    for name in ('some_library', 'some_library.tables'):
        sys.modules.pop(name, None)


def waiting():
    return [finder for finder in sys.meta_path if isinstance(finder, plugin._Waiting)]


def test_told_when_it_is_imported(library):
    before = len(waiting())
    plugin.announce()
    plugin.announce()
    assert len(waiting()) == before + 1
    importlib.import_module('some_library')
    assert library == []
    module = importlib.import_module('some_library.tables')
    assert library == [module] and module.TABLE == {}
    assert len(waiting()) == before
    importlib.reload(module)
    assert library == [module]


def test_told_at_once_if_it_came_first(library):
    module = importlib.import_module('some_library.tables')
    before = len(waiting())
    plugin.announce()
    assert library == [module] and len(waiting()) == before


def test_absent_library_stays_absent(library, monkeypatch):
    monkeypatch.setattr(plugin, '_LISTENERS', {'no_such_library': library.append})
    plugin.announce()
    with pytest.raises(ModuleNotFoundError, match='no_such_library'):
        importlib.import_module('no_such_library')
    assert library == []


def test_mmpretrain_is_told_once():
    class Hub:
        names: set = set()

        @classmethod
        def has(cls, name):
            return name in cls.names

        @classmethod
        def register_model_index(cls, path, config_prefix):
            assert path.is_file() and path.is_relative_to(config_prefix)
            cls.names.add(f'{path.parent.name}')
            if path.parent.name == 'greenmim':
                assert f'Name: {plugin._KNOWN}\n' in path.read_text()
                cls.names.add(plugin._KNOWN)

    plugin._tell_mmpretrain(SimpleNamespace(ModelHub=Hub))
    assert Hub.names == {plugin._KNOWN, *plugin._MMPRETRAIN}
    Hub.names = {plugin._KNOWN}
    plugin._tell_mmpretrain(SimpleNamespace(ModelHub=Hub))
    assert Hub.names == {plugin._KNOWN}
