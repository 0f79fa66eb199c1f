"""Checkpoints and folders of runs: full disks, damage, copies, bad images."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.logging import MessageHub, MMLogger
from small_runs import STEPS, AtIteration, assert_same, config, interrupt_at, train

from greenmim_mm.datasets import DataError
from greenmim_mm.engine.checkpoints import CheckpointError, damage, last_checkpoint, read_meta
from greenmim_mm.engine.hooks import CheckpointHook, Interruption


def test_full_disk(folder, tmp_path, monkeypatch):
    """The last checkpoint stays whole, nothing half-written is left, and the message says so."""
    put = LocalBackend.put

    def full(self, obj, filepath):
        if 'epoch_2' in str(filepath):
            Path(filepath).write_bytes(obj[: len(obj) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, obj, filepath)

    monkeypatch.setattr(LocalBackend, 'put', full)
    cfg = config(tmp_path, folder, checkpoint=dict(max_keep_ckpts=1))
    with pytest.raises(CheckpointError) as error_info:
        train(cfg)
    message = str(error_info.value)
    assert f'checkpoint {tmp_path}/epoch_2.pth cannot be written: No space left' in message
    assert f'go on with --resume: {tmp_path}/epoch_1.pth is whole' in message
    assert {path.name for path in tmp_path.iterdir() if 'epoch' in path.name} == {'epoch_1.pth'}
    assert not damage(tmp_path / 'epoch_1.pth')
    monkeypatch.undo()
    losses, _ = train(cfg, resume=True)
    assert sorted(losses) == list(range(STEPS, 3 * STEPS))


def test_killed_while_writing(folder, tmp_path, monkeypatch):
    """However little has reached the disk, the checkpoint before is there and is named."""
    put = LocalBackend.put

    class Killed(BaseException):
        pass

    def killed(self, obj, filepath):
        put(self, obj[:1000] if 'epoch_2' in str(filepath) else obj, filepath)
        if 'epoch_2' in str(filepath):
            raise Killed

    monkeypatch.setattr(LocalBackend, 'put', killed)
    cfg = config(tmp_path, folder, epochs=2, checkpoint=dict(max_keep_ckpts=1))
    with pytest.raises(Killed):
        train(cfg)
    monkeypatch.undo()
    assert list(tmp_path.glob('.*.part'))
    assert last_checkpoint(tmp_path) == tmp_path / 'epoch_1.pth'
    losses, _ = train(cfg, resume=True)
    assert sorted(losses) == list(range(STEPS, 2 * STEPS))
    assert not list(tmp_path.glob('.*.part'))


def save(path, epoch):
    content = dict(meta=dict(epoch=epoch, iter=5 * epoch), state_dict=dict(x=torch.rand(1000)))
    torch.save(content, path)


def test_damaged_checkpoints(tmp_path):
    assert last_checkpoint(tmp_path) is None is last_checkpoint(tmp_path / 'nowhere')
    for epoch in (8, 9, 10):
        save(tmp_path / f'epoch_{epoch}.pth', epoch)
    last = tmp_path / 'epoch_10.pth'
    (tmp_path / 'last_checkpoint').write_text(str(last))
    assert last_checkpoint(tmp_path) == last and read_meta(last)['epoch'] == 10
    content = last.read_bytes()
    # A bit anywhere in the tensors; torch.load sees nothing.
    place = content.index(torch.load(last, weights_only=False)['state_dict']['x'].numpy().tobytes())
    flipped = bytearray(content)
    flipped[place + 1234] ^= 0x10
    for damaged in (bytes(flipped), content[:-100], content[: len(content) // 2], b'', b'words'):
        last.write_bytes(damaged)
        assert damage(last)
        assert last_checkpoint(tmp_path) == tmp_path / 'epoch_9.pth'  # not 8, though 8 < 10 < 9
    (tmp_path / 'epoch_9.pth').write_bytes(b'')
    assert last_checkpoint(tmp_path) == tmp_path / 'epoch_8.pth'
    (tmp_path / 'epoch_8.pth').write_bytes(b'')
    with pytest.raises(CheckpointError, match=r'no checkpoint in .* is whole: .*epoch_10.pth'):
        last_checkpoint(tmp_path)


def test_every_bit_of_the_tensors_counts(tmp_path):
    path = tmp_path / 'epoch_1.pth'
    save(path, 1)
    content = path.read_bytes()
    tensor = torch.load(path, weights_only=False)['state_dict']['x'].numpy().tobytes()
    start = content.index(tensor)
    for place in np.random.default_rng(0).integers(start, start + len(tensor), 200):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert 'checksum' in damage(path)


def test_folders_that_are_copied_or_moved(tmp_path):
    old, new = tmp_path / 'old', tmp_path / 'new'
    old.mkdir()
    save(old / 'epoch_1.pth', 1)
    (old / 'last_checkpoint').write_text(str(old / 'epoch_1.pth'))
    shutil.copytree(old, new)
    assert last_checkpoint(new) == new / 'epoch_1.pth'
    shutil.rmtree(old)
    assert last_checkpoint(new) == new / 'epoch_1.pth'
    # Checkpoints that lie elsewhere are found by their path.
    (new / 'epoch_1.pth').rename(tmp_path / 'epoch_1.pth')
    (new / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    assert last_checkpoint(new) == tmp_path / 'epoch_1.pth'


def test_runs_go_on_in_copied_and_moved_folders(folder, tmp_path, whole):
    """And do nothing to the folder that they are a copy of."""
    first, copied, moved = (tmp_path / name for name in ('first', 'copied', 'moved'))
    seen = {}
    for work_dir, iteration in ((first, STEPS + 1), (copied, STEPS + 3)):
        interrupt_at(iteration)
        with pytest.raises(Interruption):
            train(config(work_dir, folder), resume=True)
        seen |= AtIteration.losses
        if work_dir == first:
            shutil.copytree(first, copied)
            before = {path: path.read_bytes() for path in first.rglob('*') if path.is_file()}
    copied.rename(moved)
    AtIteration.actions = {}
    rest, final = train(config(moved, folder), resume=True)
    assert seen | rest == whole[0] and min(rest) == STEPS + 4
    assert_same(final, whole[1])
    assert {p: p.read_bytes() for p in first.rglob('*') if p.is_file()} == before
    assert not copied.exists()


def test_the_best_checkpoint_is_that_of_the_own_folder(tmp_path):
    hub = MessageHub.get_instance('best')
    hub.update_info('best_ckpt', '/elsewhere/best_acc_epoch_1.pth')
    runner = SimpleNamespace(
        work_dir=str(tmp_path), message_hub=hub, logger=MMLogger.get_instance('best')
    )
    hook = CheckpointHook(save_best='acc', rule='greater')
    hook.before_train(runner)
    assert hook.best_ckpt_path == str(tmp_path / 'best_acc_epoch_1.pth')


def test_bad_images_are_named_in_the_work_folder(folder, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(folder, data)
    (data / '3.png').write_bytes((folder / '3.png').read_bytes()[:-200])
    (data / '7.png').write_bytes(b'')
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'bad_images.txt').write_text('of another run\tx\n')
    losses, _ = train(config(run, data, workers=2))
    assert sorted(losses) == list(range(3 * STEPS))
    lines = (run / 'bad_images.txt').read_text().splitlines()
    assert sorted(line.split('\t')[0] for line in lines) == [
        str(data / '3.png'),
        str(data / '7.png'),
    ]
    assert all('Error' in line.split('\t')[1] for line in lines)
    cfg = config(run, data)
    cfg.train_dataloader.dataset.max_bad = 1
    with pytest.raises(DataError, match='2 of 10 images cannot be used, more than the 1'):
        train(cfg)
