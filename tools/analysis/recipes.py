"""Counts parameters and multiply-adds of all recipes, for docs/recipes.md and the metafiles.

Example:
    python tools/analysis/recipes.py
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PLAIN = ('_base_', 'demo')


def recipes() -> list[str]:
    """All recipes by folder and name; not the demo's."""
    paths = sorted((ROOT / 'configs').glob('*/*.py'))
    return [f'{p.parent.name}/{p.stem}' for p in paths if p.parent.name not in _PLAIN]


def image_size(cfg) -> tuple[int, int]:
    """Height and width of the image that a recipe's multiply-adds are counted for."""
    if cfg.default_scope == 'mmdet':
        return 800, 1280
    if cfg.default_scope == 'mmseg':
        return 512, 2048
    size = cfg.model.backbone.get('img_size', 224)
    return size, size


def count(name: str) -> dict:
    """Parameters and multiply-adds of a recipe's model."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from greenmim_mm.benchmark.complexity import HollowModel

    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    init_default_scope(cfg.default_scope)
    # What is counted does not start from anything.
    cfg.model.backbone.pop('init_cfg', None)
    model = HollowModel(cfg.model)
    height, width = image_size(cfg)
    return dict(
        parameters=model.num_parameters(),
        backbone=model.num_parameters('backbone'),
        multiply_adds=model.multiply_adds((height, width)),
        size=f'{width}x{height}',
    )


def line(name: str, counts: dict) -> str:
    """A row of the table."""
    return (
        f'| [{name}](../configs/{name}.py) | {counts["parameters"] / 1e6:.1f} M '
        f'| {counts["backbone"] / 1e6:.1f} M | {counts["multiply_adds"] / 1e9:.1f} G '
        f'| {counts["size"]} |'
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('pattern', nargs='?', default='', help='only recipes whose name matches')
    args = parser.parse_args(argv)
    print('| recipe | parameters | of the backbone | multiply-adds | image |')
    print('| --- | --- | --- | --- | --- |')
    for name in recipes():
        if re.search(args.pattern, name):
            print(line(name, count(name)), flush=True)


if __name__ == '__main__':
    main()
