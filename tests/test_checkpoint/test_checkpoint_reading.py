"""Reading: what a file holds, and that nothing in it is run."""

import os
import tarfile
import zipfile
from collections import Counter, OrderedDict
from functools import partial

import pytest
import torch
from mmengine.logging import HistoryBuffer
from runner_files import Payload
from torch import nn

from greenmim_mm.checkpoint import CheckpointError, find_state_dict, read_checkpoint


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
