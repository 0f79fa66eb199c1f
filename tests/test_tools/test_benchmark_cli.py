"""tools/benchmark.py: each command from end to end, bad input, interrupts, missing memory."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from greenmim_mm.archs import SWIN_ARCHS
from greenmim_mm.benchmark import candidates, grouping, measure
from greenmim_mm.benchmark.candidates import Candidate, GreenMIMStep, mae, simmim
from greenmim_mm.compat import fakes_gather

REPO = Path(__file__).resolve().parents[2]
MINI = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
MINI_VIT = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)


def load_tool():
    path = REPO / 'tools' / 'benchmark.py'
    spec = importlib.util.spec_from_file_location('benchmark', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


class Tiny(nn.Module):
    """A model that does hardly anything, or what a test wants to happen in a step."""

    def __init__(self, candidate):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.event = candidate.options.get('event', lambda: None)

    def draw(self, images):
        return None

    def forward(self, images, drawn):
        self.event()
        return (images * self.weight[:, None, None]).sum()


@pytest.fixture(autouse=True)
def mini_table(monkeypatch):
    """A table of four small candidates, which tests may change."""
    peer = dict(batch=2, needs=('mmcv', 'mmpretrain'))
    table = [
        Candidate('green', 'Mini', 'GreenMIM mini', GreenMIMStep, MINI, batch=2),
        Candidate('simmim', 'Mini', 'SimMIM mini', simmim, MINI, 192, 6, **peer),
        Candidate('mae', 'Mini', 'MAE mini', mae, MINI_VIT, **peer),
    ]
    monkeypatch.setattr(candidates, 'CANDIDATES', table)
    monkeypatch.setitem(SWIN_ARCHS, 'mini', MINI)
    return table


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiny(name, event=lambda: None, group='Mini'):
    return Candidate(name, group, name.title(), Tiny, {}, 32, batch=2, options=dict(event=event))


def rows(text):
    """Tables of the output: ``{first cell: {column: cell}}``."""
    found, head = {}, None
    for line in text.splitlines():
        if not line.startswith('|'):
            head = None
            continue
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if head is None:
            head = cells
        elif set(cells) != {'---'}:
            found[cells[0]] = dict(zip(head, cells, strict=True))
    return found


def test_pretrain_end_to_end(tmp_path, capfd):
    path = tmp_path / 'figures.json'
    assert tool.main(['--repeats', '2', '--threads', '1', '--json', str(path)]) == 0
    out, err = capfd.readouterr()
    table = rows(out)
    assert list(table) == ['GreenMIM mini', 'SimMIM mini', 'MAE mini']
    ours, peer = table['GreenMIM mini'], table['SimMIM mini']
    assert ours['first row is faster by'] == '1.00x'
    assert ours['planning a step'].endswith(' ms') and peer['planning a step'] == '-'
    assert int(peer['first row keeps less by'].rstrip('%')) > 0
    assert 'peak memory' not in ours and 'note' not in ours

    for line in (
        '- command: tools/benchmark.py pretrain --repeats 2',
        '- threads: 1',
        '- torch: 2.',
    ):
        assert line in out
    assert [line.split()[5] for line in err.splitlines() if ': round ' in line] == [
        *('green', 'simmim', 'mae'),
        *('green', 'simmim', 'mae'),
    ]

    figures = json.loads(path.read_text())
    assert not figures['interrupted']
    assert figures['environment']['precision'] == 'fp32'
    ours, peer, _ = figures['results']
    assert len(ours['seconds']) == len(peer['seconds']) == 2
    assert ours['kept_bytes'] < peer['kept_bytes']


def test_pretrain_under_autocast(capsys):
    assert tool.main(['pretrain', '--models', 'green', '--amp', '--repeats', '1']) == 0
    out = capsys.readouterr().out
    assert '- precision: bf16 autocast' in out
    assert list(rows(out)) == ['GreenMIM mini']


def test_grouping_end_to_end(tmp_path, capsys):
    path = tmp_path / 'figures.json'
    argv = ['grouping', '--pixels', '224', '256', '--table-limit', '224', '--repeats', '2']
    assert tool.main([*argv, '--json', str(path)]) == 0
    table = rows(capsys.readouterr().out)
    assert table['224 px']['groups by table-filling'].endswith(' ms')
    assert table['256 px']['note'] == 'table-filling skipped above 224 px'
    assert [r['tokens'] for r in json.loads(path.read_text())['results']] == [768, 1024]


def test_dense_end_to_end(capsys):
    assert tool.main(['dense', '--arch', 'mini', '--size', '100x130', '--repeats', '2']) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ['GreenSwin', 'mmdet.SwinTransformer']
    note = table['mmdet.SwinTransformer']['note']
    assert note.startswith('maps differ by at most ')
    assert float(note.split()[-1]) < 1e-4
    assert table['mmdet.SwinTransformer']['first row is faster by'].endswith('x')


@pytest.mark.skipif(not fakes_gather(), reason='the command says that this torch is too old')
def test_traffic_end_to_end(tmp_path, capsys):
    path = tmp_path / 'figures.json'
    argv = ['traffic', '--batch', '64', '--roofline', 'A100', '--json', str(path)]
    assert tool.main(argv) == 0
    out = capsys.readouterr().out
    table = rows(out)
    ours, peer = table['GreenMIM mini'], table['SimMIM mini']
    assert ours['bytes over the first row'] == '1.00x'
    assert float(peer['bytes over the first row'].rstrip('x')) > 1
    assert ours['estimate for A100, bf16'].endswith(' ms')
    assert 'GreenMIM mini, by part and by operator:' in out

    entry, *_ = json.loads(path.read_text())['results']
    assert entry['total'] == [sum(column) for column in zip(*entry['parts'].values(), strict=True)]
    assert tool.main([*argv[:-2], '--models', 'green', '--bandwidth', '0.0204']) == 0
    slow = rows(capsys.readouterr().out)['GreenMIM mini']['estimate for A100, bf16']
    before = entry['estimates']['A100'] * 1000
    assert float(slow.removesuffix(' ms')) > 10 * before


@pytest.mark.parametrize('command', ['pretrain', 'dense'])
def test_missing_peers_are_listed(command, monkeypatch, capsys):
    monkeypatch.setattr(candidates, 'find_spec', lambda name: None)
    argv = [command, '--repeats', '1']
    argv += ['--arch', 'mini', '--size', '64x64'] if command == 'dense' else []
    assert tool.main(argv) == 0
    table = rows(capsys.readouterr().out)
    ours, *peers = table.values()
    assert ours['note'] == '' and ours['batch']
    assert [peer['note'] for peer in peers] == ['skipped: mmcv is not installed'] * len(peers)
    assert len(peers) == (1 if command == 'dense' else 2)


def test_a_batch_that_does_not_fit_is_a_row(mini_table, capsys):
    def explode():
        raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')

    mini_table[:] = [tiny('one'), tiny('two', explode), tiny('three'), tiny('four', group='Next')]
    assert tool.main(['--repeats', '2', '--batch', '5']) == 0
    table = rows(capsys.readouterr().out)
    assert table['Two']['note'] == 'out of memory at batch 5'
    assert table['Three']['first row is faster by'].endswith('x')
    assert table['Four']['images/s, median (min-max)'] != '-'


def test_a_real_allocation_that_fails_is_a_row(mini_table, monkeypatch, capsys):
    monkeypatch.setattr(measure, 'available_memory', lambda: 100 << 20)
    mini_table[:] = [tiny('one'), tiny('two')]
    assert tool.main(['--repeats', '1', '--batch', '100000']) == 0
    notes = [row['note'] for row in rows(capsys.readouterr().out).values()]
    assert notes == ['out of memory at batch 100000'] * 2


def test_an_interrupt_prints_what_was_measured(mini_table, tmp_path, capsys):
    steps = iter(range(100))

    def interrupt():
        # Two steps to warm up, one to count bytes, one for the update, one a round: the second
        # round ends it.
        if next(steps) == 5:
            raise KeyboardInterrupt

    mini_table[:] = [tiny('one'), tiny('two', interrupt), tiny('three', group='Next')]
    path = tmp_path / 'figures.json'
    assert tool.main(['--repeats', '3', '--json', str(path)]) == 130
    table = rows(capsys.readouterr().out)
    assert [row['note'] for row in table.values()] == [
        'interrupted after 2 of 3 rounds',
        'interrupted after 1 of 3 rounds',
        'interrupted after 0 of 3 rounds',
    ]
    assert table['One']['first row is faster by'] == '1.00x'
    assert table['Two']['first row is faster by'].endswith('x')
    figures = json.loads(path.read_text())
    assert figures['interrupted']
    assert [len(result['seconds']) for result in figures['results']] == [2, 1, 0]


def test_an_interrupt_before_anything_prints_no_table(monkeypatch, capsys):
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(grouping, 'run', interrupt)
    assert tool.main(['grouping']) == 130
    assert '- command:' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--models', 'swin-h'], 'no model is named swin-h; there are green, simmim, mae'),
        (['--batch', '0'], "'0' is not a positive whole number"),
        (['--repeats', '-1'], "'-1' is not a positive whole number"),
        (['--repeats', 'many'], "'many' is not a positive whole number"),
        (['--threads', '1.5'], "'1.5' is not a positive whole number"),
        (['--device', 'tpu'], "invalid choice: 'tpu'"),
        (['--find-batch'], '--find-batch needs --device cuda'),
        (['grouping', '--pixels', '100'], 'image of 100x100 pixels'),
        (['grouping', '--mask-ratio', '1'], 'mask_ratio=1.0 must lie strictly between 0 and 1'),
        (['traffic', '--roofline', 'TPU'], 'no device is named TPU; there are H100, A100, RTX4090'),
        (['traffic', '--peak', '0'], "'0' is not a positive number"),
        (['traffic', '--launch', 'fast'], "'fast' is not a positive number"),
        (['dense', '--size', '800'], "'800' is not a height and width such as 800x1216"),
        (['dense', '--arch', 'huge'], "invalid choice: 'huge'"),
        (['densest'], 'unrecognized arguments: densest'),
    ],
)
def test_bad_input_is_one_line_and_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == '' and err.count('\n') == 1
    assert message in err


@pytest.mark.parametrize('command', ['pretrain', 'dense'])
def test_cuda_that_is_not_there_is_refused(command, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as caught:
        tool.main([command, '--device', 'cuda'])
    assert caught.value.code == 2
    assert 'PyTorch finds no CUDA device here' in capsys.readouterr().err


def test_json_is_not_overwritten_unless_forced(mini_table, tmp_path, capsys):
    mini_table[:] = [tiny('one')]
    path = tmp_path / 'figures.json'
    path.write_text('mine')
    with pytest.raises(SystemExit) as caught:
        tool.main(['--json', str(path)])
    assert caught.value.code == 2 and 'exists' in capsys.readouterr().err
    assert path.read_text() == 'mine'
    with pytest.raises(SystemExit):
        tool.main(['--json', str(tmp_path / 'no' / 'figures.json')])
    assert tool.main(['--repeats', '1', '--json', str(path), '--force']) == 0
    assert json.loads(path.read_text())['results'][0]['name'] == 'one'
    assert [entry.name for entry in tmp_path.iterdir()] == ['figures.json']


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(['--help'])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert 'Examples:' in out and 'grouping' in out
