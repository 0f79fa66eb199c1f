"""What holds for every name, network, option and file of checkpoints, on drawn examples."""

import io
import pickle
import pickletools
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from greenmim_mm.checkpoint import (
    FORMATS,
    CheckpointError,
    convert_file,
    convert_state_dict,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from greenmim_mm.checkpoint.architecture import check_window_size
from greenmim_mm.checkpoint.notes import find_changed, make_checksums
from greenmim_mm.checkpoint.unpickling import scan
from greenmim_mm.models import GreenSwin, GreenSwinV2
from greenmim_mm.text import printable

LAYOUTS = [(entry.name, layout) for entry in FORMATS.values() for layout in entry.layouts]
PLACES = [(layout, name) for _, layout in LAYOUTS for name in layout.names]


def filled(template: str, stage: int, merging: int, block: int, leaf: str) -> str:
    """A canonical name, as a person would fill it in."""
    values = {'{s}': stage, '{d}': merging, '{d+1}': merging + 1, '{b}': block, '{p}': leaf}
    for placeholder, value in values.items():
        template = template.replace(placeholder, str(value))
    return template


VALUES = st.tuples(
    st.integers(0, 3), st.integers(0, 2), st.integers(0, 199), st.sampled_from(['weight', 'bias'])
)


@given(st.sampled_from(PLACES), VALUES)
def test_names_go_there_and_back(place, values):
    layout, template = place
    name = filled(template, *values)
    key = layout.from_canonical(name)
    assert key is not None
    assert name.startswith(('head.', 'neck.')) or key.startswith(layout.prefix)
    assert layout.to_canonical(key) == name


PIECES = sorted(
    {piece for _, layout in LAYOUTS for name in layout.names for piece in name.split('.')}
    | {'layers', 'encoder', 'features', 'mlp', 'fc1', '0', '1', '07', '4', '10000', '-1', 'ü', ''}
)


@given(st.sampled_from(LAYOUTS), st.lists(st.sampled_from(PIECES) | st.text(), max_size=7))
def test_no_two_keys_have_one_name(named, pieces):
    _, layout = named
    key = '.'.join(pieces)
    if (name := layout.to_canonical(key)) is not None:
        assert layout.from_canonical(name) == key


@st.composite
def networks(draw):
    """Parameters of a small random Swin, with the version of Swin."""
    version = draw(st.sampled_from([1, 2]))
    heads = draw(st.lists(st.sampled_from([1, 2]), min_size=4, max_size=4))
    depths = draw(st.lists(st.integers(1, 2), min_size=4, max_size=4))
    windows = draw(st.lists(st.integers(1, 4), min_size=4, max_size=4))
    # transformers reads the width of its MLP as a share of the channels.
    arguments = dict(
        arch=dict(embed_dims=4 * draw(st.integers(1, 2)), depths=depths, num_heads=heads),
        window_size=windows,
        mlp_ratio=draw(st.sampled_from([1, 2.5, 4])),
    )
    model = (GreenSwin, GreenSwinV2)[version - 1](**arguments)
    state_dict = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    for value in state_dict.values():
        if value.is_floating_point():
            value.uniform_(-1, 1)
    return version, state_dict


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.sampled_from(sorted(FORMATS)))
def test_networks_go_there_and_back(network, target):
    version, state_dict = network
    assume(version in FORMATS[target].versions)
    if version == 2:
        # Buffers scale with windows: by those of pre-training, which not every format keeps.
        state_dict = {k: v for k, v in state_dict.items() if 'relative_coords' not in k}
    there = convert_state_dict(state_dict, 'greenmim_mm', target)
    back = convert_state_dict(there, target, 'greenmim_mm')
    for key, value in state_dict.items():
        if 'relative_' not in key or key.endswith('bias_table'):
            assert torch.equal(back[key], value), key


ANY = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-1, 70), max_size=5), st.dictionaries(st.text(max_size=2), st.none()),
)  # fmt: skip


@given(ANY)
def test_windows_are_checked(value):
    try:
        sizes = check_window_size(value)
    except ValueError as error:
        assert 'window_size=' in str(error)
    else:
        assert len(sizes) == 4 and all(1 <= size <= 64 for size in sizes)
        assert value == sizes[0] or tuple(value) == sizes


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp('source') / 'x.pth'
    arch = dict(embed_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    weights = GreenSwin(arch, window_size=2).state_dict()
    averaged = {f'module.{key}': value for key, value in weights.items()}
    torch.save({'state_dict': weights, 'ema_state_dict': averaged, 'meta': {}}, path)
    return path


OPTIONS = st.fixed_dictionaries(
    {'target': st.sampled_from(sorted(FORMATS)) | st.sampled_from(['', 'swin', 'MMDET'])},
    optional=dict(
        source=st.sampled_from(['auto', 'mmdet', 'mmpretrain', 'timm', 'none']),
        window_size=ANY | st.sampled_from([2, 3, (3, 2, 2, 1)]),
        pretrained_window_size=st.none() | ANY,
        dtype=st.sampled_from([None, 'fp16', 'bf16', 'fp32', 'int8', '', 'FP16']),
        strict=st.booleans(),
        key=st.sampled_from([None, 'state_dict', 'ema_state_dict', 'meta', 'x']),
        force=st.booleans(),
    ),
)


@given(OPTIONS, st.sampled_from(['x.pth', 'x.pt', 'x.safetensors', 'x', 'x.onnx', 'no/x.pth']))
def test_options_convert_or_are_refused(source, options, name):
    with tempfile.TemporaryDirectory() as folder:
        dst = Path(folder, name)
        try:
            result = convert_file(source, dst, **options)
        except (ValueError, OSError) as error:
            assert str(error) and '\n' not in str(error)
            assert list(Path(folder).iterdir()) == []
        else:
            assert result.path == dst and result.report.lossless
            read = load_checkpoint(dst)
            assert read.checked == 'tensors' and len(read.state_dict) > 50
            assert [path.name for path in Path(folder).iterdir()] == [name]


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
TENSORS = st.builds(
    lambda shape, dtype, seed: (
        torch.rand(shape, generator=torch.Generator().manual_seed(seed)).mul(100).to(dtype)
    ),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
STATE_DICTS = st.dictionaries(st.text(min_size=1, max_size=9), TENSORS, min_size=1, max_size=5)


@given(STATE_DICTS, st.randoms())
def test_checksums_notice_every_bit(state_dict, random):
    checksums = make_checksums(state_dict)
    assert find_changed({k: v.clone() for k, v in state_dict.items()}, checksums) is None
    key = random.choice(sorted(state_dict))
    value = state_dict[key]
    assert find_changed({k: v for k, v in state_dict.items() if k != key}, checksums) == key
    assert find_changed({**state_dict, key: value[None]}, checksums) == key
    assert find_changed({**state_dict, key: value.to(torch.complex64)}, checksums) == key
    if value.numel() and value.dtype != torch.bool:
        changed = value.clone()
        numbers = changed.reshape(-1).view(torch.uint8)
        numbers[random.randrange(len(numbers))] ^= 1 << random.randrange(8)
        assert find_changed({**state_dict, key: changed}, checksums) == key


@given(STATE_DICTS, st.sampled_from(['pth', 'safetensors']), st.booleans())
def test_files_hold_what_was_written(state_dict, suffix, mmap):
    state_dict = {key.replace('__metadata__', ''): value for key, value in state_dict.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f'x.{suffix}')
        save_checkpoint(state_dict, path, 'mmdet')
        read = read_checkpoint(path, mmap=mmap)['state_dict']
        assert read.keys() == state_dict.keys()
        for key, value in state_dict.items():
            assert read[key].dtype == value.dtype and torch.equal(read[key], value)
        del read


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=5)
        | st.tuples(inner, inner)
    ),
    max_leaves=30,
)


@pytest.mark.parametrize('protocol', [2, 3, 4])
@given(content=PLAIN, before=st.binary(max_size=20))
def test_pickles_of_plain_things_pass(content, before, protocol):
    data = pickle.dumps(content, protocol)
    source = io.BytesIO(before + data + before)
    source.seek(len(before))
    assert scan(source) == len(before) + len(data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'x.pth')
        torch.save({'content': content}, path, pickle_protocol=protocol)
        assert read_checkpoint(path) == {'content': content}


OPCODES = st.sampled_from(pickletools.opcodes).map(lambda opcode: opcode.code.encode('latin-1'))


@given(st.lists(OPCODES | st.binary(max_size=4), max_size=40))
def test_any_bytes_are_scanned(pieces):
    """What passes leads to no more than an exception of unpickling."""
    data = b'\x80\x02' + b''.join(pieces) + b'.'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            end = scan(io.BytesIO(data))
    except (pickle.UnpicklingError, ValueError):
        return
    assert 0 < end <= len(data)

    class Nothing(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError('nothing is found')

    try:
        Nothing(io.BytesIO(data)).load()
    except MemoryError as error:
        raise AssertionError('more was claimed than there is') from error
    except Exception:
        pass


@given(st.text(), st.integers(0, 50))
def test_printed_text_stays_on_its_line(text, limit):
    line = printable(text, limit)
    assert line.isprintable() and '\n' not in line


def test_bad_files_say_so(tmp_path):
    path = tmp_path / 'x.pth'
    for data in (b'', b'PK\x03\x04', pickle.dumps({'a': 1}), b'\x80\x02.'):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r'x\.pth'):
            read_checkpoint(path)
