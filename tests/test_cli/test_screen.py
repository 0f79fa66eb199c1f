"""What people see, with and without a terminal."""

import io
import json
from types import SimpleNamespace

import pytest
import torch

from greenmim_mm.cli.pretraining.hooks import ProgressHook, cut_metrics, draw_loss, read_metrics
from greenmim_mm.cli.screen import Screen, clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def steps(hook, first, last, total=100):
    runner = SimpleNamespace(
        iter=first,
        max_iters=total,
        epoch=0,
        max_epochs=2,
        optim_wrapper=SimpleNamespace(get_lr=lambda: dict(lr=[0.1])),
        message_hub=SimpleNamespace(log_scalars={}),
    )
    hook.before_train(runner)
    batch = dict(inputs=torch.zeros(4, 1))
    for step in range(first, last):
        runner.iter = step
        hook.before_train_iter(runner, step)
        hook.after_train_iter(runner, step, batch, dict(loss=torch.tensor(1.0 / (step + 1))))
    hook.after_train(runner)


def test_progress_on_a_terminal_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    stream = Terminal()
    steps(ProgressHook(Screen(stream), tmp_path / 'metrics.jsonl'), 0, 100)
    text = stream.getvalue()
    assert 'to go, as the first 20 steps tell' in text
    # The estimate, and the status that stays.
    assert text.count('\n') == 2
    last = text.rpartition('\r\x1b[K')[2]
    assert last.startswith('step 100/100  loss 0.0100  ')
    assert 'waiting for data  0 s left\n' in last


def test_without_a_terminal_lines_are_few(tmp_path):
    stream = io.StringIO()
    steps(ProgressHook(Screen(stream), tmp_path / 'metrics.jsonl'), 0, 100)
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ['step', 'about', 'step']
    assert '\r' not in stream.getvalue()


def test_metrics_after_a_resume_have_each_step_once(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    steps(ProgressHook(Screen(io.StringIO()), path), 0, 30)
    with path.open('a') as file:
        file.write('{"step": 31, "lo')  # killed while it wrote
    steps(ProgressHook(Screen(io.StringIO()), path), 25, 100)
    entries = [json.loads(line) for line in path.open()]
    assert [entry['step'] for entry in entries] == list(range(1, 101))
    assert entries[9]['loss'] == pytest.approx(0.1) and entries[9]['lr'] == 0.1


def test_long_runs_have_a_line_for_many_steps(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    steps(ProgressHook(Screen(io.StringIO()), path), 0, 30, total=20_000)
    entries = read_metrics(path)
    assert [entry['step'] for entry in entries] == [10, 20, 30]
    assert entries[0]['loss'] == pytest.approx(sum(1 / n for n in range(1, 11)) / 10, abs=1e-5)
    draw_loss(path, tmp_path / 'loss.png')
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')
    cut_metrics(path, 20)
    assert [entry['step'] for entry in read_metrics(path)] == [10, 20]


def test_nobody_looks():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    screen = Screen(Closed())
    screen.say('x')
    screen.status('y', now=True)
    assert screen.quiet


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(5, '5 s'), (89, '89 s'), (100, '2 min'), (12_000, '3 h 20 min'), (187_200, '2 d 4 h')],
)
def test_clock(seconds, text):
    assert clock(seconds) == text
