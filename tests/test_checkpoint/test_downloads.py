"""Checkpoints with an address."""

import hashlib
import os
import subprocess
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from runner_files import Payload, assert_same, tiny_swin

from greenmim_mm.checkpoint import CheckpointError, load_backbone_state_dict


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
