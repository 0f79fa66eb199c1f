"""Writing: whole or not at all."""

import os
import pickle

import pytest
import torch

from greenmim_mm.checkpoint import read_checkpoint, save_checkpoint


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
