"""The demo's road: skipping, resuming, failing; and the whole of it on very little data."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from greenmim_mm.demo.report import average_precision, read_losses
from greenmim_mm.demo.road import FULL, NETWORKS, QUICK, ROOT, steps
from greenmim_mm.demo.running import Step, StepError, run_steps

SCRIPT = """
import pathlib, sys
folder, text, *options = sys.argv[1:]
out = pathlib.Path(folder)
if (out / 'crash').exists():
    (out / 'last_checkpoint').touch()
    print('the last words')
    sys.exit(3)
print('Epoch(train) [1][10/20]  lr: 1.0  data_time: 0.1  loss: 0.5')
(out / 'result').write_text(' '.join([text, *options]))
"""


@pytest.fixture
def small_road(tmp_path):
    """Two steps; the second reads the first and a file, and can resume."""
    (tmp_path / 'tool.py').write_text(SCRIPT)
    (tmp_path / 'recipe').write_text('fast')
    texts = {'first': 'one', 'second': 'two'}
    said = []

    def run():
        said.clear()
        road = [
            Step('first', 'do one', f'tool.py out/first {texts["first"]}', ('result',)),
            Step(
                'second',
                'do two',
                f'tool.py out/second {texts["second"]}',
                ('result',),
                ('first',),
                ('recipe',),
                resumes=True,
            ),
        ]
        return run_steps(road, tmp_path / 'out', said.append, tmp_path)

    return tmp_path / 'out', texts, said, run


def test_second_call_passes_over_what_is_done(small_road):
    folder, _, said, run = small_road
    assert all(outcome.fresh for outcome in run().values())
    assert '    Epoch(train) [1][10/20] lr: 1.0 loss: 0.5' in said
    assert (folder / 'second/result').read_text() == 'two'
    assert not any(outcome.fresh for outcome in run().values())
    assert sum('already there' in line for line in said) == 2


def test_changed_command_is_done_anew_with_all_that_follows(small_road):
    folder, texts, _, run = small_road
    run()
    texts['first'] = 'three'
    assert all(outcome.fresh for outcome in run().values())
    assert (folder / 'first/result').read_text() == 'three'


def test_changed_file_is_read_anew(small_road):
    folder, _, _, run = small_road
    run()
    (folder.parent / 'recipe').write_text('slow')
    outcomes = run()
    assert not outcomes['first'].fresh and outcomes['second'].fresh


def test_lost_result_is_made_again(small_road):
    folder, _, _, run = small_road
    run()
    (folder / 'first/result').unlink()
    outcomes = run()
    assert outcomes['first'].fresh and not outcomes['second'].fresh


def test_interrupted_training_resumes(small_road):
    folder, _, said, run = small_road
    run()
    (folder / 'second/result').unlink()
    notes = folder / 'steps/second.json'
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {'done': False, 'seconds': 100}))
    (folder / 'second/last_checkpoint').touch()
    outcomes = run()
    assert outcomes['second'].seconds > 100
    assert set((folder / 'second/result').read_text().split()) == {'two', '--resume'}
    assert any('resumes' in line for line in said)


def test_failure_tells_the_step_and_the_log(small_road):
    folder, texts, _, run = small_road
    run()
    (folder / 'second/result').unlink()
    (folder / 'second/crash').touch()
    with pytest.raises(StepError, match=r'(?s)step second failed with exit code 3.*the last words'):
        run()
    assert 'the last words' in (folder / 'steps/second.log').read_text()
    (folder / 'second/crash').unlink()
    assert run()['second'].fresh


@pytest.mark.parametrize('model', NETWORKS)
def test_every_step_of_the_road_reads_earlier_steps(model):
    done = set()
    for step in steps(QUICK.with_model(model)):
        assert set(step.inputs) <= done
        words = shlex.split(step.command)
        assert (ROOT / words[0]).is_file()
        assert all((ROOT / file).is_file() for file in step.files)
        assert {word for word in words if word.startswith('configs/')} <= set(step.files)
        done.add(step.name)


def test_networks_share_nothing_but_the_road():
    roads = {model: steps(QUICK.with_model(model)) for model in NETWORKS}
    assert [step.name for step in roads['swin']] == [step.name for step in roads['swinv2']]
    for step in roads['swinv2']:
        assert 'work_dirs/demo_quick' not in step.command
    folders = [scale.with_model(model).folder for scale in (FULL, QUICK) for model in NETWORKS]
    names = ('demo', 'demo_swinv2', 'demo_quick', 'demo_swinv2_quick')
    assert folders == [f'work_dirs/{name}' for name in names]


def test_unknown_network():
    with pytest.raises(ValueError, match="model='vit' is unknown; use one of swin, swinv2"):
        QUICK.with_model('vit')
    command = [sys.executable, 'tools/demo.py', '--model', 'vit']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and "invalid choice: 'vit'" in run.stderr
    plan = subprocess.run(
        ['make', '-n', 'demo', 'QUICK=1', 'MODEL=swinv2'], cwd=ROOT, capture_output=True, text=True
    )
    assert "tools/demo.py --quick --model 'swinv2'" in plan.stdout


def test_losses_of_a_resumed_run_are_joined(tmp_path):
    for name, entries in {'1': [(10, 3.0), (20, 2.0)], '2': [(20, 2.5), (30, 1.0)]}.items():
        folder = tmp_path / name / 'vis_data'
        folder.mkdir(parents=True)
        lines = [json.dumps(dict(step=step, loss=loss)) for step, loss in entries]
        (folder / 'scalars.json').write_text('\n'.join([*lines, json.dumps(dict(lr=1, step=30))]))
    steps_, losses = read_losses(tmp_path)
    np.testing.assert_array_equal(steps_, [10, 20, 30])
    np.testing.assert_array_equal(losses, [3.0, 2.5, 1.0])


def test_average_precision(tmp_path):
    """A perfect and a missing detection out of two; and nothing at all."""
    truth = dict(
        images=[dict(id=1, width=64, height=64)],
        categories=[dict(id=1, name='1')],
        annotations=[
            dict(id=i, image_id=1, category_id=1, bbox=box, area=400, iscrowd=0)
            for i, box in enumerate([[0, 0, 20, 20], [40, 40, 20, 20]], 1)
        ],
    )
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    found = [dict(image_id=1, category_id=1, bbox=[0, 0, 20, 20], score=0.9)]
    (tmp_path / 'found.json').write_text(json.dumps(found))
    (tmp_path / 'none.json').write_text('[]')
    half = average_precision(tmp_path / 'truth.json', tmp_path / 'found.json', 'bbox')
    assert half['AP'] == pytest.approx(0.5, abs=0.01)
    assert average_precision(tmp_path / 'truth.json', tmp_path / 'none.json', 'bbox')['AP'] == 0


def test_whole_road_quick():
    """``make demo QUICK=1``, in a fresh folder: exit code 0, a report with all its pictures."""
    command = [sys.executable, 'tools/demo.py', '--quick', '--fresh']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    folder = ROOT / QUICK.folder
    report = (folder / 'report.md').read_text()
    assert '| GreenMIM |' in report and '| from scratch |' in report
    for line in report.splitlines():
        if line.startswith('!['):
            picture: Path = folder / line.partition('(')[2].rstrip(')')
            assert picture.stat().st_size > 1000
    results = json.loads((folder / 'results.json').read_text())
    assert set(results) == {'greenmim', 'scratch'}
    log = (folder / 'steps/detect_greenmim.log').read_text()
    assert 'unexpected key' not in log
    again = subprocess.run(command[:-1], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and again.stdout.count('already there') == len(steps(QUICK))
