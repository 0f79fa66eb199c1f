"""Bad input and bad luck: a clear error, nothing run, nothing half-written."""

import errno
import json
import os
import pickle
import resource
import struct
import tempfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tiny_swins import pretrained_file, pretrained_weights
from torchvision.models import resnet18

from greenmim_mm import fileio
from greenmim_mm.checkpoint import (
    CheckpointError,
    convert_file,
    convert_state_dict,
    load_checkpoint,
    read_checkpoint,
)

NORM = 'backbone.stages.2.blocks.1.norm1.weight'


class Payload:
    """Pickles to a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Mine:
    """An object of the user's own, as a trainer may put into a checkpoint."""

    def __init__(self):
        self.value = 3


@pytest.fixture
def destination(tmp_path):
    """Where a file would be written; nothing but the source may lie beside it afterwards."""
    folder = tmp_path / 'out'
    folder.mkdir()
    yield folder / 'x.pth'
    assert list(folder.iterdir()) == []


def refuse(src, destination, message, target='mmdet', **options):
    with pytest.raises((CheckpointError, OSError), match=message) as error:
        convert_file(src, destination, target, **options)
    assert '\n' not in str(error.value)
    return str(error.value)


def write(path, weights):
    torch.save({'state_dict': weights}, path)
    return path


@pytest.mark.parametrize('share', [0.0, 0.001, 0.3, 0.99])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_truncated(tmp_path, destination, suffix, share):
    src = tmp_path / f'src{suffix}'
    convert_file(pretrained_file(tmp_path), src, 'mmdet')
    data = src.read_bytes()
    src.write_bytes(data[: int(len(data) * share)])
    assert str(src) in refuse(src, destination, 'truncated or is no checkpoint')


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin', '.safetensors'])
def test_not_of_torch(tmp_path, destination, suffix):
    src = tmp_path / f'src{suffix}'
    for content in (b'hello, this is a text', b'\0' * 100, b'\xff' * 100, b'PK\x03\x04' * 9):
        src.write_bytes(content)
        refuse(src, destination, 'is no checkpoint')


def rewritten(src, path, compression=zipfile.ZIP_STORED, **records):
    """A copy of an archive with other records."""
    with zipfile.ZipFile(src) as old, zipfile.ZipFile(path, 'w', compression) as new:
        for name in old.namelist():
            new.writestr(
                name, records.get(name.rpartition('/')[2].replace('.', '_'), None) or old.read(name)
            )
    return path


def test_zip_bomb(tmp_path, destination):
    src = pretrained_file(tmp_path)
    zeros = bytes(1 << 28)
    bomb = rewritten(src, tmp_path / 'bomb.pth', zipfile.ZIP_DEFLATED, **{'0': zeros})
    assert bomb.stat().st_size < 1 << 21
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del zeros
    refuse(bomb, destination, 'zip bomb: .* is compressed')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # kilobytes
    # Even if it is harmless: a compressed record cannot be mapped.
    refuse(rewritten(src, tmp_path / 'packed.pth', zipfile.ZIP_DEFLATED), destination, 'compressed')
    assert load_checkpoint(rewritten(src, tmp_path / 'plain.pth')).state_dict


def test_overlapping_records(tmp_path, destination):
    """The other kind of bomb: many names for the same bytes."""
    src = tmp_path / 'src.pth'
    with zipfile.ZipFile(src, 'w') as archive:
        archive.writestr('archive/data.pkl', bytes(1 << 16))
        record = archive.infolist()[0]
        for index in range(50):
            twin = zipfile.ZipInfo(f'archive/data/{index}')
            twin.file_size = twin.compress_size = record.file_size
            twin.header_offset, twin.CRC = record.header_offset, record.CRC
            archive.filelist.append(twin)
    refuse(src, destination, 'zip bomb: .* overlap')


def test_tensor_larger_than_its_memory(tmp_path, destination):
    weights = pretrained_weights()
    weights[NORM] = torch.zeros(1).expand(1 << 40)
    refuse(write(tmp_path / 'x.pth', weights), destination, rf'{NORM} claims 1099511627776 values')


@pytest.mark.parametrize(
    'function, args, name',
    [
        (os.system, ('touch {marker}',), 'posix.system'),
        (eval, ("open('{marker}', 'w')",), 'builtins.eval'),
        (exec, ("open('{marker}', 'w')",), 'builtins.exec'),
    ],
)
def test_code_is_named_and_not_run(tmp_path, destination, function, args, name):
    marker = tmp_path / 'ran'
    args = [arg.format(marker=marker) for arg in args]
    src = tmp_path / 'src.pth'
    content = {'state_dict': pretrained_weights(), 'x': Payload(function, *args), 'y': Mine()}
    torch.save(content, src)
    message = refuse(src, destination, 'could run code')
    assert f'{name}, {__name__}.Mine' in message and '--trust' in message
    assert not marker.exists()
    convert_file(src, tmp_path / 'trusted.pth', 'mmdet', trust=True)
    assert marker.exists()


@pytest.mark.parametrize('zipped', [True, False])
def test_objects_of_ones_own_need_trust(tmp_path, destination, zipped):
    src = tmp_path / 'src.pth'
    content = {'state_dict': pretrained_weights(), 'args': Mine()}
    torch.save(content, src, _use_new_zipfile_serialization=zipped)
    refuse(src, destination, rf'may call {__name__}\.Mine\. Only if you trust')
    assert read_checkpoint(src, trust=True)['args'].value == 3
    convert_file(src, tmp_path / 'trusted.pth', 'mmdet', trust=True)


def test_trusted_file_that_fails(tmp_path, destination):
    src = tmp_path / 'src.pth'
    torch.save({'x': Payload(int, 'three')}, src)
    refuse(src, destination, 'is no checkpoint .*three', trust=True)


@pytest.mark.parametrize('source', ['auto', 'mmdet'])
@pytest.mark.parametrize('kind', ['resnet', 'vit'])
def test_other_networks(tmp_path, destination, kind, source):
    vit = VisionTransformer(img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    network = resnet18() if kind == 'resnet' else vit
    src = write(tmp_path / 'x.pth', network.state_dict())
    message = refuse(src, destination, 'no known Swin|another|fits', source=source)
    assert 'first keys' in message


@pytest.mark.parametrize(
    'key, shape',
    [
        (NORM, (33,)),
        ('backbone.stages.0.blocks.0.attn.w_msa.qkv.weight', (24, 9)),
        ('backbone.stages.1.blocks.0.attn.w_msa.relative_position_bias_table', (9, 3)),
        ('backbone.patch_embed.projection.weight', (9, 3, 4, 4)),
        ('backbone.stages.1.downsample.reduction.weight', (32, 65)),
    ],
)
def test_wrong_shape(tmp_path, destination, key, shape):
    src = write(tmp_path / 'x.pth', pretrained_weights() | {key: torch.zeros(shape)})
    message = refuse(src, destination, 'has shape')
    assert f'{key} has shape {shape}' in message and 'should be' in message


def test_half_of_the_keys_missing(tmp_path, destination):
    weights = pretrained_weights()
    half = dict(list(weights.items())[: len(weights) // 2])
    refuse(write(tmp_path / 'x.pth', half), destination, r'no whole Swin: .*are lacking, e\.g\.')


def test_two_formats_mixed(tmp_path, destination):
    weights = pretrained_weights()
    timm = convert_state_dict(weights, 'greenmim_mm', 'timm')
    src = write(tmp_path / 'x.pth', weights | timm)
    refuse(src, destination, 'keys of two formats are mixed: .*greenmim_mm.*')


def test_huge_block_number(tmp_path, destination):
    weights = pretrained_weights()
    weights[NORM.replace('blocks.1', 'blocks.99999999')] = weights[NORM]
    refuse(write(tmp_path / 'x.pth', weights), destination, r'blocks\.99999999\..* is no layer')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('key', [NORM, 'neck.decoder_pred.bias'])
def test_not_finite(tmp_path, destination, key, value):
    weights = pretrained_weights()
    weights[key][1] = value
    src = write(tmp_path / 'x.pth', weights)
    count = '1 NaN and 0 infinite' if value != value else '0 NaN and 1 infinite'
    message = f'{key} has {count} of {weights[key].numel()} values'
    refuse(src, destination, message, 'greenmim_mm')


def test_destination_exists(tmp_path):
    src, dst = pretrained_file(tmp_path), tmp_path / 'x.pth'
    dst.write_text('precious')
    with pytest.raises(FileExistsError, match='exists.*--force'):
        convert_file(src, dst, 'mmdet')
    assert dst.read_text() == 'precious'
    (tmp_path / 'y').touch()
    with pytest.raises(FileExistsError, match='is a file; this format takes the name of a folder'):
        convert_file(src, tmp_path / 'y', 'huggingface')


@pytest.fixture
def small_files():
    """As on a full disk: no file may grow beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CASES = [('x.pth', 'mmdet'), ('x.safetensors', 'timm'), ('hf', 'huggingface')]


@pytest.mark.parametrize('name, target', CASES)
@pytest.mark.parametrize('replace', [False, True])
def test_disk_full(tmp_path, request, name, target, replace):
    src = pretrained_file(tmp_path)
    folder = tmp_path / 'out'
    folder.mkdir()
    if replace:
        convert_file(src, folder / name, target)
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    request.getfixturevalue('small_files')
    with pytest.raises(OSError, match='could not be written'):
        convert_file(src, folder / name, target, force=replace)
    assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()} == before
    assert len(list(folder.iterdir())) == replace


@pytest.mark.parametrize('name, target', CASES)
def test_no_space_is_noticed_before(tmp_path, monkeypatch, destination, name, target):
    usage = fileio.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fileio.shutil, 'disk_usage', lambda path: usage)
    src = pretrained_file(tmp_path)
    refuse(src, destination.parent / name, 'its disk has 0 MB left', target)


@pytest.mark.parametrize('name, target', CASES)
def test_no_permission(tmp_path, monkeypatch, destination, name, target):
    def denied(*args, dir=None, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', str(dir))

    src = pretrained_file(tmp_path)
    monkeypatch.setattr(tempfile, 'mkstemp', denied)
    monkeypatch.setattr(tempfile, 'mkdtemp', denied)
    refuse(src, destination.parent / name, 'Permission denied', target)


def test_failed_replacement_of_a_folder(tmp_path, monkeypatch):
    """The old folder comes back if the new one cannot take its place."""
    src, dst = pretrained_file(tmp_path), tmp_path / 'out' / 'hf'
    dst.parent.mkdir()
    convert_file(src, dst, 'huggingface')
    before = (dst / 'model.safetensors').read_bytes()
    replace = os.replace

    def fail(source, target):
        if os.path.basename(source) == 'new':
            raise OSError(errno.EIO, 'Input/output error')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='Input/output'):
        convert_file(src, dst, 'huggingface', force=True, dtype='fp16')
    assert (dst / 'model.safetensors').read_bytes() == before
    assert list(dst.parent.iterdir()) == [dst]


def test_arguments(tmp_path, destination):
    src = pretrained_file(tmp_path)
    for options, message in (
        (dict(target='swin'), "'swin' is unknown; known formats: greenmim_mm"),
        (dict(source='swin'), "'swin' is unknown; known formats: greenmim_mm"),
        (dict(dtype='int8'), "dtype='int8' is unknown; use one of fp16, bf16, fp32"),
        (dict(window_size=0), 'window_size=0 must be a positive integer or 4'),
        (dict(window_size=(7, 7, 7)), r'window_size=\(7, 7, 7\) must be .* 4 of them'),
    ):
        with pytest.raises(ValueError, match=message):
            convert_file(src, destination, **{'target': 'mmdet', **options})
    with pytest.raises(ValueError, match=r'the suffix decides.*\.safetensors'):
        convert_file(src, destination.with_suffix('.onnx'), 'mmdet')
    with pytest.raises(ValueError, match='huggingface takes a folder'):
        convert_file(src, destination, 'huggingface')
    refuse(tmp_path / 'none.pth', destination, r'none\.pth does not exist')
    refuse(src, destination.parent / 'none' / 'x.pth', 'folder .*none does not exist')
    refuse(src, destination.parent / 'none' / 'hf', 'folder .*none does not exist', 'huggingface')


@pytest.mark.parametrize('length', [1 << 62, (1 << 64) - 1, 200 << 20, 1000])
def test_safetensors_header_length(tmp_path, destination, length):
    src = tmp_path / 'x.safetensors'
    src.write_bytes(struct.pack('<Q', length) + b'{}' + bytes(50))
    refuse(src, destination, f'header claims {length} bytes of 60')


def header(entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack('<Q', len(text)) + text


@pytest.mark.parametrize(
    'entries',
    [
        {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 1 << 40]}},
        {'a': {'dtype': 'F32', 'shape': [1 << 60], 'data_offsets': [0, 8]}},
        {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [8, 0]}},
        {'a': {'dtype': 'X1', 'shape': [2], 'data_offsets': [0, 8]}},
        ['a'],
    ],
)
def test_corrupt_safetensors(tmp_path, destination, entries):
    src = tmp_path / 'x.safetensors'
    src.write_bytes(header(entries) + bytes(8))
    refuse(src, destination, 'truncated or is no checkpoint')


def test_safetensors_without_parameters(tmp_path, destination):
    src = tmp_path / 'x.safetensors'
    save_file({}, src)
    refuse(src, destination, 'holds no parameters')


def test_damaged_folders(tmp_path, destination):
    folder = tmp_path / 'hf'
    convert_file(pretrained_file(tmp_path), folder, 'huggingface')
    weights, config = folder / 'model.safetensors', folder / 'config.json'
    settings = config.read_text()
    for text, message in (
        ('{', 'config.json is no JSON'),
        ('[]', 'config.json holds a list'),
        ('\ufffe', 'no JSON'),
    ):
        config.write_text(text)
        refuse(folder, destination, message)
    config.unlink()
    refuse(folder, destination, r'is a folder without config\.json')
    config.write_text(settings)
    weights.write_bytes(weights.read_bytes()[:5000])
    refuse(folder, destination, 'truncated')
    weights.unlink()
    refuse(folder, destination, r'is a folder without model\.safetensors')
    (tmp_path / 'empty').mkdir()
    refuse(tmp_path / 'empty', destination, r'without config\.json and model\.safetensors')


def test_legacy_pickle_is_no_way_around(tmp_path, destination):
    src = tmp_path / 'x.pth'
    src.write_bytes(pickle.dumps({'state_dict': {}, 'x': Payload(os.system, 'true')}))
    refuse(src, destination, 'not a file of torch.save')
