"""Reading, loading and writing checkpoint files."""

import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18

from greenmim_mm.checkpoint import (
    CheckpointError,
    find_state_dict,
    load_backbone_state_dict,
    load_model_state_dict,
    read_checkpoint,
    save_checkpoint,
)
from greenmim_mm.models import GreenMIM, GreenSwin
from greenmim_mm.ops import resize_bias_table

ARCH = dict(embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))


def tiny_swin(**changes) -> GreenSwin:
    return GreenSwin(**{**dict(arch=ARCH, window_size=2), **changes})


def tiny_model() -> GreenMIM:
    return GreenMIM(
        backbone=dict(type='greenmim_mm.GreenSwin', arch=ARCH, window_size=2, img_size=64),
        neck=dict(
            type='greenmim_mm.GreenMIMPretrainDecoder',
            embed_dim=64,
            decoder_embed_dim=16,
            decoder_num_heads=2,
        ),
        head=dict(
            type='mmpretrain.MAEPretrainHead',
            patch_size=32,
            loss=dict(type='mmpretrain.PixelReconstructionLoss', criterion='L2'),
        ),
        data_preprocessor=dict(type='mmpretrain.SelfSupDataPreprocessor'),
    )


class RandomImages(Dataset):
    metainfo = {'classes': ('a', 'b')}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(inputs=torch.rand(3, 64, 64), data_samples=0)


@contextmanager
def mmengine_globals_restored():
    """A Runner leaves its scope, logger and message hub behind, which other tests would meet."""
    managers = (DefaultScope, MessageHub, MMLogger, Visualizer)
    saved = [dict(manager._instance_dict) for manager in managers]
    try:
        yield
    finally:
        for manager, instances in zip(managers, saved, strict=True):
            manager._instance_dict.clear()
            manager._instance_dict.update(instances)


@pytest.fixture(scope='module')
def runner_file(tmp_path_factory):
    """What mmengine's Runner writes after an epoch, with schedules, logs and optimizer."""
    folder = tmp_path_factory.mktemp('run')
    with mmengine_globals_restored():
        runner = Runner(
            model=tiny_model(),
            work_dir=str(folder),
            train_dataloader=DataLoader(RandomImages(), batch_size=1),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.1, begin=0, end=1),
                dict(type='MultiStepLR', milestones=[1, 2]),
            ],
            default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
            experiment_name='test_files',
        )
        runner.train()
    return folder / 'epoch_1.pth'


def test_read_runner_checkpoint(runner_file):
    raw = torch.load(runner_file, weights_only=False)
    assert isinstance(raw['message_hub']['log_scalars']['train/loss'], HistoryBuffer)
    content = read_checkpoint(runner_file)
    assert content.keys() == raw.keys()
    assert content['state_dict'].keys() == raw['state_dict'].keys()
    for key, value in raw['state_dict'].items():
        assert torch.equal(content['state_dict'][key], value)
    assert content['meta']['epoch'] == 1
    assert content['param_schedulers'][0]['start_factor'] == 0.1
    moments = content['optimizer']['state'][0]['exp_avg']
    assert torch.equal(moments, raw['optimizer']['state'][0]['exp_avg'])
    # The log is there by name; nothing of mmengine's was made for it.
    assert not isinstance(content['message_hub']['log_scalars']['train/loss'], HistoryBuffer)


@pytest.mark.parametrize('zipped', [True, False])
def test_read_keeps_values(tmp_path, zipped):
    base = torch.arange(12.0).reshape(3, 4)
    content = OrderedDict(
        state_dict={
            'view': base.t()[1:],
            'base': base,
            'half': torch.rand(3).half(),
            'bf16': torch.rand(3).bfloat16(),
            'index': torch.arange(3),
            'parameter': nn.Parameter(torch.rand(2)),
            'empty': torch.zeros(0),
            'scalar': torch.tensor(1.5),
        },
        meta=dict(epoch=3, name='x', dtype=torch.float16, nested=[(1, None, True)]),
        schedule=Counter([1, 2]),
    )
    path = tmp_path / 'x.pth'
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    for key, value in content['state_dict'].items():
        assert read['state_dict'][key].dtype == value.dtype
        assert torch.equal(read['state_dict'][key], value)
    assert read['meta'] == content['meta']


class Payload:
    """Pickles to a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def altering_pickle() -> bytes:
    """A pickle that sets an attribute of a function which it may only call."""
    return (
        b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n'
        b'N}X\x04\x00\x00\x00evilK\x01s\x86b.'  # BUILD with the state (None, {'evil': 1})
    )


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(
    'function, args',
    [
        (os.system, ('touch {marker}',)),
        (eval, ("open('{marker}', 'w')",)),
        (exec, ("open('{marker}', 'w')",)),
        (partial, (os.system, 'touch {marker}')),
        (open, ('{marker}', 'w')),
    ],
)
def test_malicious_pickle_runs_nothing(tmp_path, function, args, zipped):
    marker = tmp_path / 'ran'
    args = [arg.format(marker=marker) if isinstance(arg, str) else arg for arg in args]
    path = tmp_path / 'evil.pth'
    torch.save(
        {'state_dict': {'w': torch.zeros(1)}, 'meta': Payload(function, *args)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match='could run code'):
        read_checkpoint(path)
    assert not marker.exists()


def test_malicious_getattr_gets_nothing(tmp_path):
    """mmengine's log buffers need getattr by name; a crafted file must not get the real one."""
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': {'w': torch.zeros(1)}, 'x': Payload(getattr, [], 'append')}, path)
    found = read_checkpoint(path)['x']
    assert type(found).__module__ == 'greenmim_mm.checkpoint.unpickling'
    assert not callable(found)


def test_malicious_pickle_alters_nothing(tmp_path):
    path = tmp_path / 'evil.pth'
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, record in records.items():
            archive.writestr(name, altering_pickle() if name.endswith('data.pkl') else record)
    with pytest.raises(CheckpointError, match='alter'):
        read_checkpoint(path)
    assert not hasattr(torch._utils._rebuild_tensor_v2, 'evil')


def test_torchscript_is_refused(tmp_path):
    path = tmp_path / 'script.pth'
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match='TorchScript'):
        read_checkpoint(path)


def test_tar_is_refused(tmp_path):
    """torch's oldest format, by which even weights_only could once be made to run code."""
    path = tmp_path / 'old.pth'
    with tarfile.open(path, 'w') as archive:
        archive.addfile(tarfile.TarInfo('storages'))
    with pytest.raises(CheckpointError, match='not a file of torch.save'):
        read_checkpoint(path)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('share', [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tmp_path, share, zipped):
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': {'w': torch.rand(1000)}}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match='truncated|damaged') as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_not_a_checkpoint(tmp_path):
    path = tmp_path / 'x.pth'
    path.write_text('Not a checkpoint.\n')
    with pytest.raises(CheckpointError, match=r'18 bytes.*not a file of torch.save'):
        read_checkpoint(path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('folder/notes.txt', 'hello')
    with pytest.raises(CheckpointError, match='no checkpoint'):
        read_checkpoint(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match='holds a list'):
        read_checkpoint(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth does not exist'):
        read_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(FileNotFoundError, match='is a folder'):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match='is a URL'):
        read_checkpoint('https://example.com/x.pth')


def test_find_state_dict():
    weights = {'w': torch.zeros(1)}
    assert find_state_dict({'state_dict': weights, 'meta': {}}) == weights
    assert find_state_dict({'model': weights, 'epoch': 3}) == weights
    assert find_state_dict({**weights, 'epoch': 3, 7: torch.zeros(1)}) == weights
    assert find_state_dict({'state_dict': {'module.w': weights['w']}}) == weights
    for nothing in ({}, {'epoch': 3}, {'state_dict': {}}, {'model': [1]}):
        with pytest.raises(CheckpointError, match='holds no parameters'):
            find_state_dict(nothing)


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(module, values):
    for key, value in module.state_dict().items():
        assert torch.equal(value, values[key]), key


def test_load_backbone_of_runner_checkpoint(runner_file):
    backbone = tiny_swin(out_indices=(0, 1, 2, 3))
    before = snapshot(backbone)
    report = load_backbone_state_dict(backbone, runner_file)
    absent = {f'norm{stage}.{p}' for stage in range(3) for p in ('weight', 'bias')}
    state_dict = torch.load(runner_file, weights_only=False)['state_dict']
    for key, value in backbone.state_dict().items():
        expected = before[key] if key in absent else state_dict['backbone.' + key]
        assert torch.equal(value, expected), key
    assert all(key in report for key in absent)
    assert f'{len(before) - 6} of {len(before)}' in report


@pytest.mark.parametrize('prefix', [None, 'model.backbone', 'model.backbone.'])
def test_load_backbone_prefix(tmp_path, prefix):
    source, target = tiny_swin(), tiny_swin()
    added = '' if prefix is None else 'model.backbone.'
    path = tmp_path / 'x.pth'
    torch.save({added + key: value for key, value in source.state_dict().items()}, path)
    load_backbone_state_dict(target, path, prefix)
    assert_same(target, source.state_dict())


def test_init_cfg_pretrained(runner_file):
    backbone = tiny_swin(init_cfg=dict(type='Pretrained', checkpoint=str(runner_file)))
    backbone.init_weights()
    state_dict = torch.load(runner_file, weights_only=False)['state_dict']
    assert_same(
        backbone,
        {key.removeprefix('backbone.'): value for key, value in state_dict.items()},
    )


def spoiled_weights(kind: str) -> dict:
    weights = tiny_swin().state_dict()
    if kind == 'resnet':
        return resnet18().state_dict()
    if kind == 'missing':
        del weights['stages.3.blocks.0.norm1.weight']
    elif kind == 'shape':
        weights['stages.3.blocks.0.norm1.weight'] = torch.zeros(3)
    elif kind == 'heads':
        weights['stages.3.blocks.0.attn.w_msa.relative_position_bias_table'] = torch.zeros(9, 5)
    elif kind == 'rows':
        weights['stages.3.blocks.0.attn.w_msa.relative_position_bias_table'] = torch.zeros(8, 4)
    return {'backbone.' + key: value for key, value in weights.items()}


@pytest.mark.parametrize(
    'kind, num_lost, message',
    [
        ('resnet', None, 'are missing'),
        ('missing', 1, r'1 are missing.*stages\.3\.blocks\.0\.norm1\.weight'),
        ('shape', 1, r'norm1\.weight: \(3,\) in the file, \(64,\) here'),
        ('heads', 1, r'\(9, 5\) in the file, \(9, 4\) here'),
        ('rows', 1, r'\(8, 4\) in the file, \(9, 4\) here'),
    ],
)
def test_load_backbone_is_all_or_nothing(tmp_path, kind, num_lost, message):
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': spoiled_weights(kind)}, path)
    for use in ('function', 'init_cfg'):
        backbone = tiny_swin(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
        before = snapshot(backbone)
        matched = 0 if num_lost is None else len(before) - num_lost
        with pytest.raises(CheckpointError, match=message) as error:
            if use == 'function':
                load_backbone_state_dict(backbone, path)
            else:
                backbone.init_weights()
        assert f'{matched} of {len(before)} keys match' in str(error.value)
        assert str(path) in str(error.value)
        assert_same(backbone, before)


def test_window_12_loads_window_7(tmp_path):
    source = tiny_swin(window_size=7)
    source.init_weights()
    target = tiny_swin(window_size=12)
    own_index = target.stages[0].blocks[0].attn.w_msa.relative_position_index.clone()
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': source.state_dict()}, path)
    load_backbone_state_dict(target, path)
    for name, value in target.state_dict().items():
        expected = source.state_dict()[name]
        if name.endswith('bias_table'):
            expected = resize_bias_table(expected, 23**2)
            assert expected.abs().max() > 0
        elif name.endswith('position_index'):
            expected = own_index
        assert torch.equal(value, expected), name
    assert target(torch.rand(1, 3, 64, 64))[0].isfinite().all()


def test_other_windows_are_told(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': tiny_swin(window_size=7).state_dict()}, path)
    assert 'tables' not in load_backbone_state_dict(tiny_swin(window_size=7), path)
    target = tiny_swin(window_size=(12, 12, 12, 7))
    report = load_backbone_state_dict(target, path)
    assert 'bias tables resized: 4 from window 7 to 12' in report


def test_the_remedy_names_the_converter(tmp_path):
    """An installed package has no tools/."""
    torch.save({'state_dict': spoiled_weights('missing')}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='greenmim convert'):
        load_backbone_state_dict(tiny_swin(), tmp_path / 'x.pth')


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that is served, its address, and the requests; downloads go to a folder of ours."""
    folder, requests = tmp_path / 'served', []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            requests.append(self.path)

    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    for name in ('http_proxy', 'HTTP_PROXY', 'https_proxy', 'HTTPS_PROXY', 'all_proxy'):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as http:
        thread = Thread(target=http.serve_forever)
        thread.start()
        yield folder, f'http://127.0.0.1:{http.server_port}', requests
        http.shutdown()
        thread.join()


def test_init_cfg_with_an_address(server, tmp_path):
    folder, address, requests = server
    source = tiny_swin()
    torch.save({'state_dict': source.state_dict()}, folder / 'swin small.pth')
    url = f'{address}/swin%20small.pth?download=true'
    for _ in range(2):
        backbone = tiny_swin(init_cfg=dict(type='Pretrained', checkpoint=url))
        backbone.init_weights()
        assert_same(backbone, source.state_dict())
    assert len(requests) == 1
    assert [file.name for file in (tmp_path / 'hub' / 'checkpoints').iterdir()] == [
        'swin small.pth'
    ]


FETCH = """
import sys
import torch.distributed as dist
from greenmim_mm.checkpoint import fetch
url, store, rank = sys.argv[1:]
dist.init_process_group('gloo', init_method=f'file://{store}', rank=int(rank), world_size=2)
print(fetch(url).read_text())
"""


@pytest.mark.parametrize('name', ['there.pth', 'none.pth'])
def test_one_process_downloads_for_all(server, tmp_path, name):
    folder, address, requests = server
    (folder / 'there.pth').write_text('parameters')
    environment = {**os.environ, 'TORCH_HOME': str(tmp_path / 'home')}
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', FETCH, f'{address}/{name}', tmp_path / 'store', str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        if name == 'there.pth':
            assert (process.returncode, out) == (0, 'parameters\n'), err
        else:  # neither waits for the other
            assert process.returncode != 0 and 'could not be downloaded' in err
    if name == 'there.pth':
        assert requests == ['/there.pth']


def test_downloads_are_read_safely(server, tmp_path):
    folder, address, _ = server
    content = {'state_dict': {}, 'x': Payload(os.system, f'touch {tmp_path / "ran"}')}
    torch.save(content, folder / 'evil.pth')
    with pytest.raises(CheckpointError, match='could run code'):
        load_backbone_state_dict(tiny_swin(), f'{address}/evil.pth')
    assert not (tmp_path / 'ran').exists()


def test_downloads_that_fail(server, tmp_path):
    folder, address, _ = server
    with pytest.raises(OSError, match=rf'{address}/none\.pth could not be downloaded: .*404'):
        load_backbone_state_dict(tiny_swin(), f'{address}/none.pth')
    with pytest.raises(FileNotFoundError, match='names no file'):
        load_backbone_state_dict(tiny_swin(), f'{address}/')
    torch.save({'state_dict': tiny_swin().state_dict()}, folder / 'swin-00000000.pth')
    with pytest.raises(CheckpointError, match='not what its name promises'):
        load_backbone_state_dict(tiny_swin(), f'{address}/swin-00000000.pth')
    assert list((tmp_path / 'hub' / 'checkpoints').iterdir()) == []
    digest = hashlib.sha256((folder / 'swin-00000000.pth').read_bytes()).hexdigest()
    (folder / 'swin-00000000.pth').rename(folder / f'swin-{digest[:8]}.pth')
    load_backbone_state_dict(tiny_swin(), f'{address}/swin-{digest[:8]}.pth')


def load_into_mmdet(monkeypatch, path, **changes):
    """Stock mmdet by its own init_cfg, and the keys that did not fit."""
    arguments = dict(
        embed_dims=8,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 4),
        window_size=2,
        init_cfg=ConfigDict(type='Pretrained', checkpoint=str(path)),
    )
    swin = MMDetSwin(**{**arguments, **changes})
    results = []
    load = swin.load_state_dict
    monkeypatch.setattr(
        swin, 'load_state_dict', lambda *args, **kwargs: results.append(load(*args, **kwargs))
    )
    swin.init_weights()
    return swin, results[0]


def test_unconverted_checkpoint_in_mmdet(monkeypatch, runner_file):
    swin, keys = load_into_mmdet(monkeypatch, runner_file)
    assert keys.unexpected_keys == []
    assert set(keys.missing_keys) == {
        f'norm{stage}.{p}' for stage in range(3) for p in ('weight', 'bias')
    }
    state_dict = torch.load(runner_file, weights_only=False)['state_dict']
    table = 'stages.2.blocks.1.attn.w_msa.relative_position_bias_table'
    assert torch.equal(swin.state_dict()[table], state_dict['backbone.' + table])


def test_resize_bias_table_is_mmdets(monkeypatch, tmp_path):
    source = tiny_swin(window_size=7)
    source.init_weights()
    path = tmp_path / 'x.pth'
    weights = {
        'backbone.' + key: value
        for key, value in source.state_dict().items()
        if not key.endswith('position_index')  # mmdet does not resize it.
    }
    torch.save({'state_dict': weights}, path)
    swin, _ = load_into_mmdet(monkeypatch, path, window_size=12)
    tables = {k: v for k, v in swin.state_dict().items() if k.endswith('bias_table')}
    assert len(tables) == 5
    for name, table in tables.items():
        assert table.abs().max() > 0
        assert torch.equal(resize_bias_table(source.state_dict()[name], 23**2), table)


def test_load_model(runner_file):
    model = tiny_model()
    load_model_state_dict(model, runner_file)
    assert_same(model, torch.load(runner_file, weights_only=False)['state_dict'])


@pytest.mark.parametrize(
    'change, num_lost, message',
    [
        ({'neck.decoder_pred.bias': None}, 1, r'1 are missing.*decoder_pred\.bias'),
        ({'neck.extra': torch.zeros(1)}, 0, r'1 are not of this network.*extra'),
        ({'neck.mask_token': torch.zeros(2)}, 1, r'\(2,\) in the file, \(1, 1, 16\) here'),
    ],
)
def test_load_model_is_strict(tmp_path, change, num_lost, message):
    model = tiny_model()
    before = snapshot(model)
    weights = {key: value + 1 for key, value in before.items()} | change
    path = tmp_path / 'x.pth'
    torch.save({key: value for key, value in weights.items() if value is not None}, path)
    match = rf'{len(before) - num_lost} of {len(before)} keys match.*{message}'
    with pytest.raises(CheckpointError, match=match):
        load_model_state_dict(model, path)
    assert_same(model, before)


def test_saving_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'x.pth'
    save_checkpoint({'w': torch.ones(2)}, path, 'mmdet')
    with pytest.raises(FileExistsError, match='--force'):
        save_checkpoint({'w': torch.zeros(2)}, path, 'mmdet')
    assert read_checkpoint(path)['state_dict']['w'].tolist() == [1, 1]
    save_checkpoint({'w': torch.zeros(2)}, path, 'mmdet', force=True)
    assert read_checkpoint(path)['state_dict']['w'].tolist() == [0, 0]
    with pytest.raises(FileNotFoundError, match='folder .*none does not exist'):
        save_checkpoint({}, tmp_path / 'none' / 'x.pth', 'mmdet')
    with pytest.raises(FileExistsError, match='is a folder'):
        save_checkpoint({}, tmp_path, 'mmdet', force=True)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        save_checkpoint({'a': torch.zeros(9)}, path, 'mmdet', {'b': lambda: None}, force=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['x.pth']
    other = tmp_path / 'plain'
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
