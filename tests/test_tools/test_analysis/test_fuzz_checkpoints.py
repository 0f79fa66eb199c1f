"""tools/analysis/fuzz_checkpoints.py: damaged files are refused, and the check itself can fail."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from greenmim_mm import checkpoint
from greenmim_mm.checkpoint import reading

PATH = Path(__file__).resolve().parents[3] / 'tools/analysis/fuzz_checkpoints.py'


def load_tool():
    spec = importlib.util.spec_from_file_location('fuzz_checkpoints', PATH)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of the parent are not there in a forked process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_damaged_files(tmp_path):
    counts, failures, largest = tool.run(147, 7, tmp_path, dict(tool.ARCH, embed_dims=16))
    assert failures == [] and counts.total() == 147
    assert {key[:2] for key in counts} == {(n, k) for n in tool.FORMATS for k in tool.KINDS}
    # Where there is no checksum, other weights are read; else nothing was damaged.
    changed = {key[0] for key, count in counts.items() if key[2] == 'changed weights' and count}
    assert changed and not any(name.startswith('ours') for name in changed)
    assert largest['seconds'] < 5 and largest['memory'] < 4


def test_the_check_can_fail(tmp_path, monkeypatch):
    original = tool.make_originals(tmp_path / 'whole', dict(tool.ARCH, embed_dims=16))[1]
    whole = tmp_path / 'whole/first' / original.name
    assert original.name == 'ours.safetensors'

    def failure(data):
        path = tool.write(original, data, tmp_path)
        result = tool.read_apart(original, path, whole, len(data))
        return tool.failure(original, 'bit flips', result, len(data))

    end = original.data[:-9] + bytes([original.data[-9] ^ 1]) + original.data[-8:]
    assert failure(end) is None
    with monkeypatch.context() as patch:
        patch.setattr(reading, 'find_changed', lambda *args: None)
        assert 'changed weights' in failure(end)

    for action, message in (
        (lambda: 1 / 0, 'ZeroDivisionError'),
        (lambda: [None for _ in iter(int, 1)], 'hung|took'),
        (lambda: bytearray(b'x' * (10 * len(end))), 'took .* bytes'),
    ):
        with monkeypatch.context() as patch:
            read = checkpoint.load_checkpoint

            def changed(path, action=action, read=read):
                if path != whole:
                    action()
                return read(path)

            patch.setattr(checkpoint, 'load_checkpoint', changed)
            patch.setattr(tool, 'MAX_SECONDS', 1)
            found = failure(original.data)
            assert found and re.search(message, found), found
