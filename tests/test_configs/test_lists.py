"""Metafiles, READMEs and docs/recipes.md name every recipe, with figures that are counted."""

import importlib.util
import re

import pytest
from mmengine.fileio import load as load_file
from recipe_runs import RECIPES, ROOT, load
from torch.utils import flop_counter


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('recipes', ROOT / 'tools/analysis/recipes.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def listed():
    """Entries of all metafiles by recipe."""
    index, found = load_file(ROOT / 'model-index.yml'), {}
    for path in index['Import']:
        metafile = load_file(ROOT / path)
        collections = {collection['Name'] for collection in metafile['Collections']}
        for collection in metafile['Collections']:
            assert (ROOT / collection['README']).is_file()
        for model in metafile['Models']:
            assert model['In Collection'] in collections
            found[model['Config'].removeprefix('configs/').removesuffix('.py')] = model
    return found


def test_metafiles_name_every_recipe(listed):
    assert sorted(listed) == RECIPES
    names = {name.split('/')[1] for name in RECIPES}
    for name, model in listed.items():
        # What mmpretrain has under the same name, too, has another one in its ModelHub.
        assert model['Name'].removesuffix('_greenmim-mm') == name.split('/')[1]
        assert set(model.get('Downstream', [])) <= names
        cfg = load(name)
        metadata, train = model['Metadata'], cfg.get('train_cfg') or {}
        assert metadata.get('Epochs') == train.get('max_epochs')
        assert metadata.get('Iterations') == train.get('max_iters')
        assert metadata.get('Batch Size') == cfg.get('auto_scale_lr', {}).get('base_batch_size')
        # Nothing was measured on the real data, and no weights are published.
        assert model['Results'] is None and model['Weights'] is None


# One of each kind; all of them take a minute.
COUNTED = [
    'greenmim/greenmim_swin-base-w7_8xb256-amp-coslr-800e_in1k',
    'simmim/simmim_swinv2-base-w12_8xb256-amp-steplr-800e_in1k-192px',
    'swin_transformer/swin-base-w7_greenmim-800e-pre_8xb256-amp-coslr-100e_in1k',
    'cascade_rcnn/cascade-mask-rcnn_greenmim-greenswin-tiny-w7_fpn_amp-ms-crop-3x_coco',
    'mask_rcnn/mask-rcnn_greenmim-swinv2-tiny-w8_fpn_amp-1x_coco',
    'upernet/upernet_greenmim-greenswin-base-w7_8xb2-amp-160k_ade20k-512x512',
]


@pytest.mark.skipif(
    not hasattr(flop_counter, 'flop_registry'), reason='torch 2.1 counts nothing on hollow tensors'
)
@pytest.mark.parametrize('name', COUNTED)
def test_figures_are_counted(name, listed, tool):
    counts = tool.count(name)
    metadata = listed[name]['Metadata']
    assert metadata['Parameters'] == counts['parameters']
    assert metadata['FLOPs'] == counts['multiply_adds']
    row = next(line for line in table() if f'[{name.split("/")[1]}]' in line)
    for key, unit, scale in (('parameters', 'M', 1e6), ('multiply_adds', 'G', 1e9)):
        assert f'{counts[key] / scale:.1f} {unit}' in row


def test_figures_are_the_papers(listed):
    """Within the rounding of papers; FLOPs also count what is no matrix product."""
    papers = {
        # Swin's paper, table 1 (a) and table 2; Swin's repository for UPerNet.
        'swin_transformer/swin-base-w7_greenmim-800e-pre': (88, 15.4),
        'cascade_rcnn/cascade-mask-rcnn_greenmim-greenswin-tiny': (86, 745),
        'cascade_rcnn/cascade-mask-rcnn_greenmim-greenswin-small': (107, 838),
        'cascade_rcnn/cascade-mask-rcnn_greenmim-greenswin-base': (145, 982),
        'upernet/upernet_greenmim-greenswin-tiny': (60, 945),
        'upernet/upernet_greenmim-greenswin-base': (121, 1188),
    }
    for start, (millions, billions) in papers.items():
        (model,) = [model for name, model in listed.items() if name.startswith(start)]
        metadata = model['Metadata']
        assert round(metadata['Parameters'] / 1e6) == millions
        assert 0.97 * billions < metadata['FLOPs'] / 1e9 < 1.005 * billions


def table() -> list[str]:
    text = (ROOT / 'docs/recipes.md').read_text(encoding='utf-8')
    return [line for line in text.splitlines() if line.startswith('| [')]


def test_table_of_all_recipes():
    named = [re.search(r'\((?:\.\./)?configs/(.+?)\.py\)', line)[1] for line in table()]
    assert sorted(named) == RECIPES


@pytest.mark.parametrize('folder', sorted({name.split('/')[0] for name in RECIPES}))
def test_readme_names_its_recipes(folder):
    text = (ROOT / 'configs' / folder / 'README.md').read_text(encoding='utf-8')
    linked = {name for name in re.findall(r'\(([^()\s]+)\.py\)', text) if '/' not in name}
    assert linked >= {name.split('/')[1] for name in RECIPES if name.startswith(f'{folder}/')}
    for path in re.findall(r'(configs/[\w./-]+\.py)', text):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r'\]\(([\w./-]+)\)', text):
        assert (ROOT / 'configs' / folder / path).exists(), path
