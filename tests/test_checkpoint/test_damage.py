"""Files that were damaged or made to do harm: noticed, named, and never costly."""

import io
import json
import pickle
import resource
import struct
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_swins import pretrained_file, pretrained_weights

from greenmim_mm.checkpoint import (
    CheckpointError,
    convert_file,
    inspect_checkpoint,
    load_checkpoint,
    read_checkpoint,
)
from greenmim_mm.checkpoint.notes import CHECKSUMS

OURS = [
    ('x.pth', 'mmdet'), ('x.pth', 'torchvision'), ('x.safetensors', 'timm'), ('hf', 'huggingface'),
]  # fmt: skip


def weights_of(path):
    return path / 'model.safetensors' if path.is_dir() else path


def flip_in(path, tensor):
    """Flip a bit in the middle of the only place in a file where a tensor's bytes are."""
    data = bytearray(path.read_bytes())
    pattern = tensor.contiguous().numpy().tobytes()
    assert data.count(pattern) == 1
    data[data.index(pattern) + len(pattern) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize('name, target', OURS)
def test_a_bit_of_a_tensor(tmp_path, name, target):
    path = tmp_path / name
    convert_file(pretrained_file(tmp_path), path, target)
    assert inspect_checkpoint(path).checked == 'tensors'
    assert 'verified (a checksum of each tensor)' in inspect_checkpoint(path).summary()
    assert CHECKSUMS not in inspect_checkpoint(path).summary()
    state_dict = load_checkpoint(path).state_dict
    key = max(state_dict, key=lambda key: state_dict[key].numel())
    flip_in(weights_of(path), state_dict[key].clone())
    for read in (inspect_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match=rf'is damaged: \S*{key} ') as error:
            read(path)
        assert '\n' not in str(error.value)


def test_a_bit_of_a_file_of_others(tmp_path):
    """Archives have checksums of their own, which torch.load does not look at."""
    path = pretrained_file(tmp_path)
    assert 'CRC-32 of each record' in inspect_checkpoint(path).summary()
    key = 'backbone.stages.3.blocks.0.ffn.layers.0.0.weight'
    flip_in(path, pretrained_weights()[key])
    assert torch.load(path)['state_dict'].keys()
    with pytest.raises(CheckpointError, match=rf'is damaged: state_dict\.{key} .*in the archive'):
        inspect_checkpoint(path)
    with pytest.raises(CheckpointError, match=r'is damaged.*checksum of data/\d+'):
        read_checkpoint(path, trust=True)
    weights = {k: v for k, v in pretrained_weights().items() if k.startswith('backbone.')}
    save_file(weights, tmp_path / 'x.safetensors')
    found = inspect_checkpoint(tmp_path / 'x.safetensors')
    assert found.checked is None and 'carries no checksum' in found.summary()
    torch.save(weights, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert inspect_checkpoint(tmp_path / 'old.pth').checked is None


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_parts_of_two_files(tmp_path, suffix):
    """Each part is whole and has its right checksum; together they are no network."""
    paths = [tmp_path / f'{name}.{suffix}' for name in 'ab']
    for index, path in enumerate(paths):
        weights = {key: value + index for key, value in pretrained_weights().items()}
        torch.save({'state_dict': weights}, tmp_path / 'src.pth')
        convert_file(tmp_path / 'src.pth', path, 'mmdet')
    mixed = tmp_path / f'mixed.{suffix}'
    if suffix == 'pth':
        with zipfile.ZipFile(paths[0]) as a, zipfile.ZipFile(paths[1]) as b:
            with zipfile.ZipFile(mixed, 'w') as new:
                for one, other in zip(a.namelist(), b.namelist(), strict=True):
                    new.writestr(one, b.read(other) if '/data/' in one else a.read(one))
    else:
        with safe_open(paths[0], 'pt') as a, safe_open(paths[1], 'pt') as b:
            save_file({key: b.get_tensor(key) for key in b.keys()}, mixed, a.metadata())
    with pytest.raises(CheckpointError, match=r'is damaged: backbone\.'):
        load_checkpoint(mixed)


def test_a_changed_header(tmp_path):
    path = tmp_path / 'x.safetensors'
    convert_file(pretrained_file(tmp_path), path, 'timm')
    data = path.read_bytes()
    length = struct.unpack('<Q', data[:8])[0]

    def rewritten(change):
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack('<Q', len(text)) + text + data[8 + length :])

    def shape(header):
        header['layers.0.blocks.0.mlp.fc1.weight']['shape'].reverse()

    def dtype(header):
        header['norm.weight']['dtype'] = 'I32'

    def name(header):
        header['norm.bios'] = header.pop('norm.bias')

    def note(header):
        header['__metadata__'][CHECKSUMS] = '{' * 100_000

    for change, key in (
        (shape, 'layers.0.blocks.0.mlp.fc1.weight'),
        (dtype, 'norm.weight'),
        (name, r'norm\.bi.s'),
        (note, CHECKSUMS),
    ):
        rewritten(change)
        with pytest.raises(CheckpointError, match=f'is damaged: {key} '):
            load_checkpoint(path)
    # Whoever changes a file on purpose takes the checksums out of its note.
    rewritten(lambda header: header['__metadata__'].pop(CHECKSUMS))
    assert load_checkpoint(path).checked is None


def archive(path, data_pkl, **storages):
    """A file of torch.save with a pickle of one's own, and right checksums."""
    with zipfile.ZipFile(path, 'w') as new:
        new.writestr('x/data.pkl', data_pkl)
        for key, data in storages.items():
            new.writestr(f'x/data/{key[1:]}', data)
    return path


def costs(path):
    """The message of a refusal, and what it took in seconds of a processor and in bytes."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    seconds = time.process_time() - start
    return (
        str(error.value),
        seconds,
        1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    )


# 2 ** 25 tuples when it is written out: to hash it takes a second, and 2 ** 60 of them for ever.
TUPLES = b'}(K\x01K\x02\x86' + b'q\x00h\x00\x86' * 60 + b'K\x00u.'
PICKLES = {
    # Its unpickler's memo would have 2 ** 31 places.
    'memo index': b'}r\xff\xff\xff\x7f.',
    'memo index ': b'\x80\x04}r\xff\xff\xff\x0f.',
    'a key': TUPLES,
    # Hashing goes into each tuple, until the stack of the process ends.
    'is a key': b'}(' + b')' + b'\x85' * 500_000 + b'K\x00u.',
    'BYTEARRAY8': b'\x80\x05\x96' + struct.pack('<Q', 1 << 40) + b'.',
    'bytes': b'\x80\x04\x8e' + struct.pack('<Q', 1 << 40) + b'.',
    'a frame': b'\x80\x04\x95' + struct.pack('<Q', 1 << 40) + b'}.',
    'LONG': b'L' + b'9' * 3_000_000 + b'L\n.',
    'steps': b'(' + b'N' * 3_000_000 + b'l.',
    'nothing there': b'0.',
}


@pytest.mark.parametrize('word', PICKLES)
@pytest.mark.parametrize('zipped', [True, False])
def test_pickles_that_ask_for_too_much(tmp_path, word, zipped):
    path = tmp_path / 'x.pth'
    if zipped:
        archive(path, PICKLES[word])
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        data = path.read_bytes()
        path.write_bytes(data.replace(b'\x80\x02}q\x00.', PICKLES[word]))
        assert path.read_bytes() != data
    message, seconds, memory = costs(path)
    assert word.strip() in message, message
    assert seconds < 5 and memory < 100 << 20


class Call:
    """Pickles to a call of ``function`` with a state."""

    def __init__(self, function, args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


class Reference:
    """Pickles to a reference to a storage."""

    def __init__(self, *pid):
        self.pid = pid


class Pickler(pickle._Pickler):
    def persistent_id(self, thing):
        return thing.pid if isinstance(thing, Reference) else None


def pickled(content):
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()


STORAGE = ('storage', torch.FloatStorage, '0', 'cpu', 4)
rebuild = torch._utils._rebuild_tensor_v2


@pytest.mark.parametrize(
    'pid, offset, size, stride, message',
    [
        (STORAGE, 0, (5,), (1,), 'claims 5 values, the file has 4'),
        (STORAGE, 1, (2, 2), (2, 1), 'claims 5 values'),
        (STORAGE, 0, (1 << 62, 8), (1 << 62, 1), 'claims'),
        (STORAGE, -1, (2,), (1,), 'negative'),
        (STORAGE, 0, (2,), (-1,), 'negative'),
        (STORAGE, 0, (2, 2), (1,), 'no shape'),
        (STORAGE, 0, (1,) * 65, (1,) * 65, 'no shape'),
        (STORAGE, 0, 4, 1, 'no shape'),
        (STORAGE[:4] + (1 << 40,), 0, (4,), (1,), 'claims 1099511627776 values'),
        (STORAGE[:4] + (-4,), 0, (4,), (1,), 'no storage'),
        (('storage', torch.FloatStorage, '7', 'cpu', 4), 0, (4,), (1,), 'truncated'),
        (('module', torch.FloatStorage, '0', 'cpu', 4), 0, (4,), (1,), 'no storage'),
    ],
)
def test_tensors_that_lie_outside_of_their_storage(tmp_path, pid, offset, size, stride, message):
    args = (Reference(*pid), offset, size, stride, False, OrderedDict())
    path = archive(tmp_path / 'x.pth', pickled({'w': Call(rebuild, args)}), _0=bytes(16))
    assert message in costs(path)[0]


def test_a_tensor_inside_its_storage(tmp_path):
    args = (Reference(*STORAGE), 1, (3,), (1,), False, OrderedDict())
    numbers = struct.pack('<4f', 1, 2, 3, 4)
    path = archive(tmp_path / 'x.pth', pickled({'w': Call(rebuild, args)}), _0=numbers)
    assert read_checkpoint(path)['w'].tolist() == [2, 3, 4]
    # Written where the highest byte comes first.
    numbers = struct.pack('>4f', 1, 2, 3, 4)
    path = archive(tmp_path / 'x.pth', pickled({'w': Call(rebuild, args)}), _0=numbers)
    with zipfile.ZipFile(path, 'a') as new:
        new.writestr('x/byteorder', 'big')
    assert read_checkpoint(path)['w'].tolist() == [2, 3, 4]


def test_dicts_keep_their_methods(tmp_path):
    state = {'items': 3, 'keys': 3, '__class__': 3, 'greenmim_mm': {'licence': 'x'}}
    weights = Call(OrderedDict, (), state)
    path = archive(tmp_path / 'x.pth', pickled({'state_dict': weights}))
    content = read_checkpoint(path)['state_dict']
    assert list(content.items()) == [] and vars(content) == {'greenmim_mm': {'licence': 'x'}}


def test_two_records_of_one_name(tmp_path):
    args = (Reference(*STORAGE), 0, (4,), (1,), False, OrderedDict())
    path = archive(tmp_path / 'x.pth', pickled({'w': Call(rebuild, args)}), _0=bytes(16))
    with zipfile.ZipFile(path, 'a') as old, pytest.warns(UserWarning, match='Duplicate'):
        old.writestr('x/data/0', b'\1' * 16)
    assert 'two records of one name' in costs(path)[0]


def test_nested_json(tmp_path):
    folder = tmp_path / 'hf'
    convert_file(pretrained_file(tmp_path), folder, 'huggingface')
    (folder / 'config.json').write_text('[' * 200_000)
    assert 'no JSON' in costs(folder)[0]


def test_storages_that_are_shared_stay_shared(tmp_path):
    base = torch.rand(4, 4)
    for zipped in (True, False):
        torch.save({'a': base, 'b': base[1:]}, tmp_path / 'x.pth',
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        for mmap in (True, False):
            read = read_checkpoint(tmp_path / 'x.pth', mmap=mmap)
            read['a'][1] = 7
            assert (read['b'][0] == 7).all()
    # What is written to tensors does not reach the file.
    assert torch.equal(read_checkpoint(tmp_path / 'x.pth')['a'], base)
