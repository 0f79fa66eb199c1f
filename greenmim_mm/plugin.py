"""What OpenMMLab's libraries are told of this package, as soon as they are imported.

Two tables name packages and recipes: mmengine's, by which ``_base_ = 'greenmim_mm::...'`` and
``mmengine.hub.get_config('greenmim_mm::...')`` find recipes, and mmpretrain's, which its
``list_models`` and ``get_model`` read. To import the libraries for that would make ``import
greenmim_mm`` take seconds; it waits for them instead.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# Recipes, tools and their index, where MIM and mmengine look for them; links in a clone.
MIM = Path(__file__).parent / '.mim'
_KNOWN = 'greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k'
# Recipes that mmpretrain builds; detectors and segmentation are not its own.
_MMPRETRAIN = ('greenmim', 'simmim', 'swin_transformer', 'swin_transformer_v2', 'benchmarks')


def _tell_mmengine(utils: ModuleType) -> None:
    utils.MODULE2PACKAGE.setdefault('greenmim_mm', 'greenmim_mm')


def _tell_mmpretrain(api: ModuleType) -> None:
    # It refuses a name that comes twice, as after a reload of this package.
    if api.ModelHub.has(_KNOWN):
        return
    for folder in _MMPRETRAIN:
        # A clone without links (a file system that has none) does without.
        if (metafile := MIM / 'configs' / folder / 'metafile.yml').is_file():
            api.ModelHub.register_model_index(metafile, config_prefix=MIM)


_LISTENERS = {
    'mmengine.config.utils': _tell_mmengine,
    'mmpretrain.apis.model': _tell_mmpretrain,
}


class _Waiting:
    """A finder that finds nothing itself: it has a module tell when it has been imported."""

    def __init__(self, name: str, listener: Callable[[ModuleType], None]) -> None:
        self.name, self.listener = name, listener

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, whose loader calls the listener at its end."""
        if name != self.name:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        specs = (f.find_spec(name, path, target) for f in others if hasattr(f, 'find_spec'))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.listener(module)

        spec.loader.exec_module = exec_module
        return spec


def announce() -> None:
    """Tell the libraries that are imported already, and the others when they are."""
    for name, listener in _LISTENERS.items():
        if any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
            continue
        if name in sys.modules:
            listener(sys.modules[name])
        else:
            sys.meta_path.insert(0, _Waiting(name, listener))
