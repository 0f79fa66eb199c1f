"""tools/convert_checkpoint.py: what it writes and prints, and how it refuses bad input."""

import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer
from timm.models.vision_transformer import VisionTransformer
from torchvision.models import resnet18

from greenmim_mm import verification
from greenmim_mm.checkpoint import convert_state_dict, spelling
from greenmim_mm.models import GreenMIMPretrainDecoder, GreenSwin
from greenmim_mm.verification import VerificationError

REPO = Path(__file__).resolve().parents[2]
ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))


def load_tool():
    path = REPO / 'tools' / 'convert_checkpoint.py'
    spec = importlib.util.spec_from_file_location('convert_checkpoint', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture
def weights():
    backbone = GreenSwin(ARCH, window_size=2)
    decoder = GreenMIMPretrainDecoder(64, 16, decoder_num_heads=2)
    return {
        **{'backbone.' + key: value for key, value in backbone.state_dict().items()},
        **{'neck.' + key: value for key, value in decoder.state_dict().items()},
    }


@pytest.fixture
def src(tmp_path, weights):
    """A file with what mmengine's Runner writes."""
    path = tmp_path / 'epoch_1.pth'
    torch.save(
        dict(
            meta=dict(epoch=1, cfg='model = dict()'),
            state_dict=weights,
            message_hub=dict(log_scalars={'train/loss': HistoryBuffer([1.0], [1])}),
            optimizer=dict(state={}, param_groups=[]),
            param_schedulers=[],
        ),
        path,
    )
    return path


def refusal(capsys, *args, code=2) -> str:
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as exit_info:
        tool.main([str(arg) for arg in args])
    assert exit_info.value.code == code
    out, err = capsys.readouterr()
    assert out == ''
    assert err.count('\n') == 1 and err.endswith('\n')
    assert 'error: ' in err
    return err


@pytest.mark.parametrize('target', ['mmdet', 'mmpretrain', 'greenmim_mm'])
def test_converts(capsys, tmp_path, src, weights, target):
    dst = tmp_path / 'swin.pth'
    tool.main([str(src), str(dst), '--to', target])
    out = capsys.readouterr().out
    written = torch.load(dst, weights_only=True)
    keep_all = target == 'greenmim_mm'
    expected = [key for key in weights if keep_all or key.startswith('backbone.')]
    assert list(written['state_dict']) == expected
    assert written['meta']['source_file'] == 'epoch_1.pth'
    assert 'licence' not in written['meta']
    assert f'kept {len(expected)} parameters, 0 of them transformed' in out
    assert ('pre-training decoder' in out) != keep_all
    assert 'left out of the file: meta, message_hub, optimizer, param_schedulers' in out
    assert f'wrote {dst}' in out
    assert f"build it with: dict(type='{target}." in out and f"checkpoint='{dst}'" in out


def test_authors_file(capsys, tmp_path, src, weights):
    authors, dst = tmp_path / 'authors.pth', tmp_path / 'swin.pth'
    torch.save({'model': convert_state_dict(weights, 'greenmim_mm', 'greenmim')}, authors)
    tool.main([str(authors), str(dst), '--to', 'mmdet', '--from', 'greenmim'])
    out = capsys.readouterr().out
    assert 'transformed 9 (channel order of patch merging)' in out
    assert 'licence: ' in out and 'CC BY-NC 4.0' in out
    written = torch.load(dst, weights_only=True)
    assert 'CC BY-NC 4.0' in written['meta']['licence']
    for key, value in written['state_dict'].items():
        assert torch.equal(value, weights[key])


def test_existing_file(capsys, tmp_path, src):
    dst = tmp_path / 'swin.pth'
    dst.write_text('precious')
    message = refusal(capsys, src, dst, '--to', 'mmdet')
    assert str(dst) in message and '--force' in message
    assert dst.read_text() == 'precious'
    tool.main([str(src), str(dst), '--to', 'mmdet', '--force'])
    assert torch.load(dst)['meta']['format'] == 'mmdet'
    capsys.readouterr()
    assert 'the source itself' in refusal(capsys, src, src, '--to', 'mmdet', '--force')


def test_missing_files(capsys, tmp_path, src):
    message = refusal(capsys, tmp_path / 'none.pth', tmp_path / 'x.pth', '--to', 'mmdet')
    assert 'none.pth does not exist' in message
    message = refusal(capsys, src, tmp_path / 'none' / 'x.pth', '--to', 'mmdet')
    assert f'folder {tmp_path / "none"} does not exist' in message


def truncated(path):
    torch.save({'state_dict': {'w': torch.rand(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def text(path):
    path.write_text('hello')


def foreign_zip(path):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.txt', 'hello')


@pytest.mark.parametrize(
    'write, reason',
    [
        (truncated, 'is truncated or is no checkpoint'),
        (text, r'is no checkpoint (5 bytes)'),
        (foreign_zip, 'is no checkpoint'),
        (lambda path: torch.save([torch.zeros(1)], path), 'holds a list, not a checkpoint'),
        (
            lambda path: torch.save({'epoch': 3}, path),
            "holds no parameters: found the keys ['epoch']",
        ),
        (lambda path: torch.save({'x': print}, path), 'could run code'),
    ],
)
def test_not_a_checkpoint(capsys, tmp_path, write, reason):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    write(src)
    message = refusal(capsys, src, dst, '--to', 'mmdet')
    assert str(src) in message and reason in message
    assert not dst.exists()


@pytest.mark.parametrize('source', ['auto', 'greenmim_mm'])
@pytest.mark.parametrize('network', ['resnet', 'vit', 'half'])
def test_another_architecture(capsys, tmp_path, weights, network, source):
    if network == 'resnet':
        state_dict = resnet18().state_dict()
    elif network == 'vit':
        vit = VisionTransformer(img_size=32, embed_dim=16, depth=1, num_heads=2)
        state_dict = {'backbone.' + key: value for key, value in vit.state_dict().items()}
    else:
        others = {f'backbone.x.{index}': torch.zeros(1) for index in range(len(weights))}
        state_dict = {**weights, **others}
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    torch.save({'state_dict': state_dict}, src)
    message = refusal(capsys, src, dst, '--to', 'mmdet', '--from', source)
    if network == 'half':
        assert f'{len(others)} learned parameters would be lost' in message
    else:
        assert 'first keys' in message
    assert not dst.exists()


def test_wrong_source_format(capsys, tmp_path, src, weights):
    message = refusal(capsys, src, tmp_path / 'x.pth', '--to', 'mmdet', '--from', 'greenmim')
    assert f'0 of {len(weights)} keys fit the format greenmim' in message


def test_verify_report_and_verbose(capsys, tmp_path, src, weights):
    dst, account = tmp_path / 'swin.pth', tmp_path / 'account.json'
    tool.main(
        [str(src), str(dst), '--to', 'timm', '--verify', '--verbose', '--report', str(account)]
    )
    out = capsys.readouterr().out
    assert 'verified: the file loads strictly into timm SwinTransformer' in out
    assert 'Swin V1 of its own size: embed_dims 8' in out
    content = json.loads(account.read_text())
    report = content['report']
    told = {*report['mapped'], *report['transformed'], *report['dropped']}
    assert told == set(weights) and report['lossless']
    assert content['meta']['source_file'] == src.name
    assert content['architecture']['window_sizes'] == [2, 2, 2, 2]
    assert content['verification']['differences']['stage 0'] < 1e-5
    assert all(key in out for key in weights)
    other = tmp_path / 'other.pth'
    message = refusal(capsys, src, other, '--to', 'timm', '--report', account)
    assert 'account.json exists' in message and not other.exists()


def test_other_network_is_exit_code_1(capsys, tmp_path, monkeypatch, src):
    def differs(*args):
        raise VerificationError('this is not the same network')

    monkeypatch.setattr(verification, 'verify_network', differs)
    dst = tmp_path / 'swin.pth'
    message = refusal(capsys, src, dst, '--to', 'timm', '--verify', code=1)
    assert 'not the same network' in message
    assert list(tmp_path.iterdir()) == [src]


def test_losses_are_exit_code_3(capsys, tmp_path, weights):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    torch.save({'state_dict': {**weights, 'backbone.novel': torch.ones(1)}}, src)
    assert '--no-strict' in refusal(capsys, src, dst, '--to', 'mmdet')
    assert '--no-strict' in refusal(capsys, src, dst, '--to', 'mmdet', '--strict')
    assert not dst.exists()
    with pytest.raises(SystemExit) as exit_info:
        tool.main([str(src), str(dst), '--to', 'mmdet', '--no-strict'])
    assert exit_info.value.code == 3
    assert 'LOST 1: backbone.novel' in capsys.readouterr().out
    assert dst.exists()


@pytest.mark.parametrize('window, expected', [('3', [3, 3, 3, 3]), ('4,4,4,2', [4, 4, 4, 2])])
def test_windows_and_dtype(capsys, tmp_path, src, window, expected):
    dst = tmp_path / 'x.safetensors'
    tool.main([str(src), str(dst), '--to', 'timm', '--window-size', window, '--dtype', 'bf16'])
    assert 'window 2 to ' in capsys.readouterr().out
    tool.main(['inspect', str(dst)])
    out = capsys.readouterr().out
    assert ', '.join(map(str, expected)) in out and 'bfloat16' in out
    for wrong in ('0', '7,7', '-3'):
        message = refusal(capsys, src, tmp_path / 'y.pth', '--to', 'timm', f'--window-size={wrong}')
        assert 'window_size=' in message


def test_inspect(capsys, tmp_path, src):
    tool.main(['inspect', str(src)])
    out = capsys.readouterr().out
    for text in ('greenmim_mm', 'GreenMIM pre-training', 'sha256', 'message_hub', 'epoch', 'dict('):
        assert text in out
    (tmp_path / 'x.pth').write_text('hello')
    assert 'no checkpoint' in refusal(capsys, 'inspect', tmp_path / 'x.pth')
    assert 'does not exist' in refusal(capsys, 'inspect', tmp_path / 'none.pth')


def test_trust(capsys, tmp_path, weights):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    torch.save({'state_dict': weights, 'when': datetime.date(2024, 1, 1)}, src)
    message = refusal(capsys, src, dst, '--to', 'mmdet')
    assert 'datetime.date' in message and '--trust' in message
    tool.main([str(src), str(dst), '--to', 'mmdet', '--trust'])
    assert 'wrote' in capsys.readouterr().out


def test_missing_library(capsys, tmp_path, monkeypatch, src):
    def missing(*args):
        raise ImportError('--verify needs the package timm')

    monkeypatch.setattr(verification, 'verify_network', missing)
    message = refusal(capsys, src, tmp_path / 'x.pth', '--to', 'timm', '--verify')
    assert 'needs the package timm' in message


@pytest.mark.parametrize('force', [[], ['--force']])
def test_report_destroys_nothing(capsys, tmp_path, src, force):
    before, hf = src.read_bytes(), tmp_path / 'hf'
    for dst, account, to in (
        (tmp_path / 'x.pth', src, 'mmdet'),
        (tmp_path / 'x.pth', tmp_path / 'x.pth', 'mmdet'),
        (tmp_path / 'x.pth', tmp_path / '.' / 'none' / '..' / 'x.pth', 'mmdet'),
        (hf, hf / 'config.json', 'huggingface'),
    ):
        refusal(capsys, src, dst, '--to', to, '--report', account, *force)
        assert src.read_bytes() == before and not dst.exists()


def test_window_options(capsys, tmp_path, src):
    for option in ('--window-size', '--pretrained-window-size'):
        with pytest.raises(SystemExit) as exit_info:
            tool.main([str(src), str(tmp_path / 'x.pth'), '--to', 'timm', option, 'abc'])
        assert exit_info.value.code == 2
        assert "'abc' is no window size" in capsys.readouterr().err
    message = refusal(capsys, src, tmp_path / 'x.pth', '--to', 'timm', '--window-size', '4000')
    assert 'at most 64' in message


@pytest.fixture
def usual_signals():
    """Whoever started the tests may have them ignored, as nohup and ``&`` do."""
    usual = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures('usual_signals')
@pytest.mark.parametrize('number, code', [('SIGTERM', 143), ('SIGHUP', 129), ('SIGINT', 130)])
def test_signals_leave_nothing_behind(capsys, tmp_path, monkeypatch, src, number, code):
    def interrupted(*args):
        os.kill(os.getpid(), getattr(signal, number))

    monkeypatch.setattr(verification, 'verify_network', interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_info:
        tool.main([str(src), str(tmp_path / 'x.pth'), '--to', 'timm', '--verify'])
    assert exit_info.value.code == code
    assert list(tmp_path.iterdir()) == [src]
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err.count('\n') <= 1


@pytest.mark.usefixtures('usual_signals')
def test_nohup_is_respected(tmp_path, monkeypatch, src):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    finite = spelling.check_finite

    def hung_up(*args):
        os.kill(os.getpid(), signal.SIGHUP)
        finite(*args)

    monkeypatch.setattr(spelling, 'check_finite', hung_up)
    tool.main([str(src), str(tmp_path / 'x.pth'), '--to', 'timm'])
    assert (tmp_path / 'x.pth').is_file()


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("can't allocate memory: 8 bytes")])
def test_too_little_memory(capsys, tmp_path, monkeypatch, src, error):
    def fails(*args):
        raise error

    monkeypatch.setattr(verification, 'verify_network', fails)
    message = refusal(capsys, src, tmp_path / 'x.pth', '--to', 'timm', '--verify')
    assert 'out of memory' in message


def test_nobody_reads_the_report(tmp_path, monkeypatch, src):
    dst = tmp_path / 'x.pth'
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, 'w') as stdout:
        monkeypatch.setattr(sys, 'stdout', stdout)
        tool.main([str(src), str(dst), '--to', 'timm', '--report', str(tmp_path / 'r.json')])
    assert dst.exists() and (tmp_path / 'r.json').exists()


def test_escapes_do_not_reach_the_terminal(capsys, tmp_path, weights):
    src = tmp_path / 'src.pth'
    torch.save({'state_dict': {**weights, 'backbone.\x1b[2Jevil': torch.ones(1)}}, src)
    assert '\x1b' not in refusal(capsys, src, tmp_path / 'x.pth', '--to', 'timm')


def test_key(capsys, tmp_path, weights):
    src, dst = tmp_path / 'src.pth', tmp_path / 'x.pth'
    torch.save({'model_ema': weights}, src)
    assert '--key model_ema' in refusal(capsys, src, dst, '--to', 'timm')
    tool.main([str(src), str(dst), '--to', 'timm', '--key', 'model_ema'])
    assert dst.exists()


def test_as_a_program(tmp_path, src):
    """As a user runs it: exit codes and streams."""
    command = [sys.executable, str(REPO / 'tools' / 'convert_checkpoint.py')]
    dst = tmp_path / 'hf'
    done = subprocess.run(
        [*command, str(src), str(dst), '--to', 'huggingface'], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (dst / 'config.json').is_file() and f'wrote {dst}' in done.stdout
    done = subprocess.run(
        [*command, str(src), str(dst), '--to', 'huggingface'], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.count('\n') == 1 and 'convert_checkpoint.py: error: ' in done.stderr
