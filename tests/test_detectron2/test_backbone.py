"""GreenSwin and GreenSwinV2 in detectron2, against a stand-in that has its interface."""

import copy
import subprocess
import sys
from collections import UserList
from collections.abc import MutableMapping
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from tiny_swins import ARCH, WINDOW, green_swin, pretrained_file, randomised

from greenmim_mm.checkpoint import CheckpointError, convert_file

STAND_IN = Path(__file__).parent / 'stand_in'
NAMES = ['p0', 'p1', 'p2', 'p3']


@pytest.fixture(scope='module')
def d2():
    """``greenmim_mm.detectron2`` beside the stand-in; or beside detectron2, where it is."""
    sys.path.append(str(STAND_IN))
    import greenmim_mm.detectron2 as package

    yield package
    sys.path.remove(str(STAND_IN))


def tiny(d2, version=1, **changes):
    arguments = dict(arch=ARCH, window_size=WINDOW, drop_path_rate=0.0)
    kind = d2.GreenSwin if version == 1 else d2.GreenSwinV2
    return kind(**{**arguments, **changes}).eval()


def images(height=100, width=132):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('version', [1, 2])
def test_interface(d2, version):
    from detectron2.modeling import Backbone, ShapeSpec

    backbone = tiny(d2, version)
    assert isinstance(backbone, Backbone)
    shapes = backbone.output_shape()
    assert list(shapes) == NAMES
    features = backbone(images())
    assert list(features) == NAMES
    for stage, (name, feature) in enumerate(features.items()):
        assert shapes[name] == ShapeSpec(channels=8 << stage, stride=4 << stage)
        sides = tuple(-(-side // (4 << stage)) for side in (100, 132))
        assert feature.shape == (2, 8 << stage, *sides)
    assert backbone.size_divisibility == 32
    assert backbone.padding_constraints == {'size_divisibility': 32, 'square_size': 0}


def test_names_stages_and_padding_of_ones_choice(d2):
    backbone = tiny(
        d2, out_indices=(1, 3), out_features=('low', 'high'), size_divisibility=0, square_pad=128
    )
    assert [(n, s.channels, s.stride) for n, s in backbone.output_shape().items()] == [
        ('low', 16, 8),
        ('high', 64, 32),
    ]
    assert list(backbone(images())) == ['low', 'high']
    assert backbone.padding_constraints == {'size_divisibility': 0, 'square_size': 128}
    assert not hasattr(backbone, 'norm0')


def test_an_fpn_takes_it(d2):
    from detectron2.modeling import FPN

    fpn = FPN(tiny(d2), NAMES, 4)
    assert [feature.shape[1:] for feature in fpn(images(128, 128)).values()] == [
        (4, 32 >> stage, 32 >> stage) for stage in range(4)
    ]


def test_features_are_those_of_mmdet(d2):
    theirs = MMDetSwin(
        embed_dims=8,
        depths=ARCH['depths'],
        num_heads=ARCH['num_heads'],
        window_size=4,
        drop_path_rate=0.0,
    )
    randomised(theirs).eval()
    ours = tiny(d2, window_size=4)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        # 40x72 pixels: the third map, of two blocks, has 3x5 tokens, fewer than a window's.
        for size in ((100, 132), (40, 72)):
            for one, other in zip(theirs(images(*size)), ours(images(*size)).values(), strict=True):
                torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('target', ['greenmim_mm', 'timm', 'huggingface', 'microsoft'])
def test_checkpoints_of_other_formats(d2, tmp_path, version, target):
    changes = dict(pretrained_window_sizes=(4, 4, 4, 2)) if version == 2 else {}
    source = pretrained_file(tmp_path, version=version, **changes)
    path = tmp_path / 'converted.pth'
    path = path if target != 'huggingface' else tmp_path / 'folder'
    convert_file(source, path, target)
    reference = green_swin(version, pad_small_map=True, **changes).eval()
    reference.init_cfg = dict(type='Pretrained', checkpoint=str(source))
    reference.init_weights()
    windows = dict(window_size=None) if target != 'timm' or version == 1 else {}
    backbone = tiny(d2, version, checkpoint=str(path), out_indices=(3,), **windows)
    with torch.no_grad():
        (expected,) = reference(images())
        torch.testing.assert_close(backbone(images())['p3'], expected, atol=1e-4, rtol=1e-4)


def test_other_windows_than_the_checkpoints(d2, tmp_path):
    source = pretrained_file(tmp_path)
    backbone = tiny(d2, checkpoint=str(source), window_size=4)
    assert backbone.window_sizes == (4, 4, 4, 4)
    reference = green_swin(window_size=4, pad_small_map=True).eval()
    reference.init_cfg = dict(type='Pretrained', checkpoint=str(source))
    reference.init_weights()
    with torch.no_grad():
        torch.testing.assert_close(backbone(images())['p3'], reference(images())[0])
    # Norms of the other outputs are not in a pre-training, and begin as they are.
    assert bool((backbone.norm0.weight == 1).all())


class Config(MutableMapping):
    """Like omegaconf's DictConfig, a mapping that is no dict."""

    def __init__(self, content):
        self.content = dict(content)

    def __getitem__(self, key):
        return self.content[key]

    def __setitem__(self, key, value):
        self.content[key] = value

    def __delitem__(self, key):
        del self.content[key]

    def __iter__(self):
        return iter(self.content)

    def __len__(self):
        return len(self.content)


def test_arguments_of_a_lazy_config(d2):
    arch = Config({key: UserList(v) if key != 'embed_dims' else v for key, v in ARCH.items()})
    four = UserList([4, 4, 4, 2])
    backbone = tiny(
        d2,
        2,
        arch=arch,
        window_size=four,
        pretrained_window_sizes=UserList([2, 2, 2, 2]),
        out_features=UserList(NAMES),
        out_indices=UserList(range(4)),
        norm_cfg=Config(dict(type='LN', eps=1e-6)),
    )
    assert backbone.window_sizes == (4, 4, 4, 2)
    assert backbone.pretrained_window_sizes == (2, 2, 2, 2)
    assert backbone.norm0.eps == 1e-6
    copy.deepcopy(backbone)


def test_yacs_config(d2, tmp_path):
    from detectron2.config import CfgNode
    from detectron2.modeling import BACKBONE_REGISTRY, ShapeSpec

    cfg = CfgNode()
    cfg.MODEL = CfgNode()
    cfg.MODEL.FPN = CfgNode(dict(IN_FEATURES=NAMES, OUT_CHANNELS=4, NORM='', FUSE_TYPE='sum'))
    d2.add_greenswin_config(cfg)
    node = cfg.MODEL.GREENSWIN
    node.VERSION, node.DROP_PATH_RATE, node.WINDOW_SIZE = 2, 0.2, [7]
    cfg.merge_from_list(['MODEL.GREENSWIN.PRETRAINED_WINDOW_SIZES', '(8, 8, 8, 8)'])
    build = BACKBONE_REGISTRY.get('build_greenswin_backbone')
    backbone = build(cfg, ShapeSpec(channels=4))
    assert isinstance(backbone, d2.GreenSwinV2)
    assert backbone.embed_dims == 96 and backbone.patch_embed.projection.in_channels == 4
    assert backbone.window_sizes == (7,) * 4 and backbone.pretrained_window_sizes == (8,) * 4
    fpn = BACKBONE_REGISTRY.get('build_greenswin_fpn_backbone')(cfg, ShapeSpec(channels=3))
    assert list(fpn.bottom_up.output_shape()) == NAMES
    node.VERSION = 3
    with pytest.raises(ValueError, match='MODEL.GREENSWIN.VERSION=3'):
        build(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(out_features=('a', 'a', 'b', 'c')), 'out_features=.* must be 4 names'),
        (dict(out_features=('a',)), 'out_features=.* must be 4 names'),
        (dict(square_pad=-1), 'square_pad=-1'),
        (dict(arch='hugue'), 'hugue'),
    ],
)
def test_wrong_arguments(d2, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(d2, **changes)


def test_wrong_checkpoints(d2, tmp_path):
    source = str(pretrained_file(tmp_path))
    with pytest.raises(CheckpointError, match='holds a Swin V1; GreenSwinV2 is a Swin V2'):
        tiny(d2, 2, checkpoint=source)
    other = dict(ARCH, depths=(2, 2, 2, 1))
    with pytest.raises(CheckpointError, match=r'holds another network than arch=.*depths=\(2, 1'):
        tiny(d2, checkpoint=source, arch=other)
    with pytest.raises(FileNotFoundError):
        tiny(d2, checkpoint=str(tmp_path / 'absent.pth'))
    windows = dict(pretrained_window_sizes=(4, 4, 4, 2))
    source = str(pretrained_file(tmp_path, version=2, **windows))
    with pytest.raises(ValueError, match=r'pre-trained with \(4, 4, 4, 2\)'):
        tiny(d2, 2, checkpoint=source, pretrained_window_sizes=(8, 8, 8, 8))


def test_without_detectron2_the_error_says_so():
    code = (
        'import sys\n'
        'sys.modules["detectron2"] = None\n'
        'try:\n'
        '    import greenmim_mm.detectron2\n'
        'except ModuleNotFoundError as error:\n'
        '    print(error)\n'
    )
    told = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'detectron2, which is not installed' in told.stdout, told.stderr
