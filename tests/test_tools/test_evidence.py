"""The study: versions and results, pre-training that resumes, the three methods, the probe."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools/analysis'))

import evidence  # noqa: E402
from study import pretrain as training  # noqa: E402
from study.data import build_data, normalise  # noqa: E402
from study.design import (  # noqa: E402
    Cell,
    DataSettings,
    PretrainSettings,
    ProbeSettings,
    Study,
    StudyError,
    cells,
    version,
)
from study.export import DEMO_CHECKPOINT, carried_weights, export  # noqa: E402
from study.pictures import paint  # noqa: E402
from study.probe import box_features, load_backbone, probe  # noqa: E402
from study.report import Spread, gains, page, read_all, write_report  # noqa: E402
from study.results import Busy, Places, read_result, working_at, write_result  # noqa: E402

from greenmim_mm.demo.report import MEASURED_GAIN  # noqa: E402

METHODS = ('greenmim', 'simmim', 'scrambled')
TINY = Study(
    data=DataSettings(image_size=96, num_unlabelled=24, num_train=30, num_dev=8, num_val=10),
    pretrain=PretrainSettings(
        arch=dict(embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2)),
        window_size=3,
        decoder=dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
        batch_size=4,
        steps=dict.fromkeys(METHODS, 8),
        lr=dict.fromkeys(METHODS, 1e-3),
        warmup=2,
        milestones=(0.0, 0.5, 1.0),
    ),
    probe=ProbeSettings(num_train=10, neighbours=3),
)
CELL = Cell('detect', 'greenmim', 1, 100)

needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, 'Muon'), reason='torch has Muon from 2.9 on'
)


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp('study')
    return Places(folder / 'docs/evidence', folder / 'state')


@pytest.fixture(autouse=True)
def one_thread_inside_only():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_version_changes_with_what_a_cell_stands_on_alone():
    study = Study()
    other = dict(study.pretrain.lr) | dict(simmim=1.0)
    changed = replace(study, pretrain=replace(study.pretrain, lr=other))
    assert version(changed, CELL) == version(study, CELL)
    simmim = replace(CELL, start='simmim')
    assert version(changed, simmim) != version(study, simmim)
    longer = replace(study, data=replace(study.data, num_unlabelled=1))
    scratch = replace(CELL, start='scratch')
    for cell in (CELL, scratch, Cell('pretrain', 'greenmim', 0), Cell('probe', 'greenmim', 0)):
        assert version(longer, cell) != version(study, cell)
    detect = replace(study, detect=replace(study.detect, lr=1.0))
    assert version(detect, CELL) != version(study, CELL)
    assert version(detect, Cell('probe', 'simmim', 0)) == version(study, Cell('probe', 'simmim', 0))


def test_every_cell_has_a_name_of_its_own_and_comes_after_its_weights():
    seen = set()
    for cell in cells(Study()):
        assert cell.name not in seen
        if cell.kind == 'probe':
            assert replace(cell, kind='pretrain').name in seen
        if cell.kind == 'detect' and cell.start != 'scratch':
            seed = Study().detect.pretrained_seed
            assert Cell('pretrain', cell.start, seed, length=cell.length).name in seen
        seen.add(cell.name)


def test_result_of_another_version_is_refused(tmp_path):
    places = Places(tmp_path, tmp_path)
    assert read_result(places, TINY, CELL) is None
    path = write_result(places, TINY, CELL, dict(box_mAP=0.5))
    assert read_result(places, TINY, CELL) == dict(box_mAP=0.5)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no temporary file
    with pytest.raises(StudyError, match='of two versions are not mixed; move it away'):
        read_result(places, replace(TINY, revision=0), CELL)
    with pytest.raises(StudyError, match='not mixed'):
        write_report(replace(TINY, revision=0), places)
    path.write_text('{"version": 1')
    with pytest.raises(StudyError, match='is no result of the study'):
        read_result(places, TINY, CELL)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(kind='detect', start='scratch', seed=0, labels=9), 'labels=9: a detector of 10'),
        (dict(kind='detect', start='mae', seed=0, labels=100), "start='mae' of detect must be"),
        (dict(kind='pretrain', start='scratch', seed=0), "start='scratch' of pretrain must be"),
        (dict(kind='pretrain', start='simmim', seed=-1), 'seed=-1 must be at least 0'),
        (dict(kind='probe', start='simmim', seed=0, length=3), 'length=3 must be a power of two'),
    ],
)
def test_impossible_cells(arguments, message):
    with pytest.raises(StudyError, match=message):
        Cell(**arguments)


def test_tool_says_in_one_line_that_there_are_fewer_labels_than_classes(tmp_path, capsys):
    arguments = [f'--state={tmp_path}', f'--results={tmp_path}']
    with pytest.raises(SystemExit) as exit_:
        evidence.main([*arguments, 'detect', '--start=scratch', '--labels=9'])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'labels=9: a detector of 10 classes needs at least as many annotated images' in line


def test_a_cell_is_worked_at_once(tmp_path):
    with working_at(tmp_path / 'cell'):
        with pytest.raises(Busy, match='another process works at'):
            with working_at(tmp_path / 'cell'):
                pass
    with working_at(tmp_path / 'cell'):
        pass


@needs_muon
def test_interrupted_pretraining_goes_on_as_if_nothing_had_happened(places, monkeypatch):
    cell = Cell('pretrain', 'scrambled', 3)
    training.pretrain(TINY, places, cell)
    whole = read_result(places, TINY, cell)
    folder = places.folder(TINY, cell)
    weights = torch.load(folder / 'step_8.pth')['state_dict']

    other = Places(places.results.with_name('again'), places.state.with_name('again'))
    other.state.mkdir()
    other.data(TINY).symlink_to(places.data(TINY))
    monkeypatch.setattr(training, '_SAVE_SECONDS', 0.0)
    loss, calls = training.masked_loss, []

    def fail_later(*args):
        calls.append(args[-1])
        # The step that is about to be taken; watching has seeds of its own.
        if args[-1][:2] == (3, 0) and args[-1][2] == 5:
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, 'masked_loss', fail_later)
        with pytest.raises(KeyboardInterrupt):
            training.pretrain(TINY, other, cell)
    training.pretrain(TINY, other, cell)
    resumed = torch.load(other.folder(TINY, cell) / 'step_8.pth')['state_dict']
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    again = read_result(other, TINY, cell)
    assert [p['held_out'] for p in again['curve']] == [p['held_out'] for p in whole['curve']]
    assert [p['step'] for p in again['curve']] == list(range(9))


@needs_muon
def test_recorded_result_stays_where_its_weights_are_made_again(places, monkeypatch, capsys):
    """On another machine results are there, as they belong to the repository; weights are not."""
    cell = Cell('pretrain', 'greenmim', 6)
    monkeypatch.setattr(evidence, 'Study', lambda: TINY)
    folders = [f'--state={places.state}', f'--results={places.results}']

    def run():
        evidence.main([*folders, 'pretrain', '--start=greenmim', '--seed=6'])
        return read_result(places, TINY, cell), capsys.readouterr().out

    recorded, _ = run()
    assert run() == (recorded, f'{cell.name}: already there\n')
    weights = training.weights_path(TINY, places, cell)
    weights.parent.rename(places.state / 'elsewhere')
    again, told = run()
    loss = recorded['held_out']
    assert again == recorded
    assert f'held-out loss {loss}, recorded {loss}; the result stays as it is' in told
    assert weights.exists()


def test_learning_rate_falls_to_zero_at_the_end_of_every_cycle():
    rates = np.array([training.schedule(TINY, 'greenmim', step) for step in range(64)])
    for end in (8, 16, 32, 64):
        begin = end // 2 if end > 8 else 0
        np.testing.assert_allclose(rates[begin : begin + 2], [0.5, 1])  # two of warm-up
        assert (np.diff(rates[begin + 2 : end]) < 0).all() and 0 < rates[end - 1] < 0.1
    assert training.milestone_steps(TINY, 'greenmim', 4) == [0, 4, 8, 16, 32]


@needs_muon
def test_longer_pretraining_goes_on_from_a_shorter_one(places):
    for length in (1, 2):
        training.pretrain(TINY, places, Cell('pretrain', 'greenmim', 4, length=length))
    short, long = (
        read_result(places, TINY, Cell('pretrain', 'greenmim', 4, length=length))
        for length in (1, 2)
    )
    assert (short['steps'], long['steps'], long['images']) == (8, 16, 64)
    assert long['curve'][:9] == short['curve'] and len(long['curve']) == 17

    at_once = replace(places, state=places.state.with_name('at_once'))
    at_once.state.mkdir()
    at_once.data(TINY).symlink_to(places.data(TINY))
    training.pretrain(TINY, at_once, Cell('pretrain', 'greenmim', 4, length=2))
    for step in (8, 16):
        first, second = (
            torch.load(training.milestone_path(TINY, where, 'greenmim', 4, step))['state_dict']
            for where in (places, at_once)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize('method', METHODS)
def test_loss_is_the_mean_error_of_hidden_pixels(method):
    torch.manual_seed(0)
    model = training.build_model(TINY, method).eval()
    images = torch.randn(4, 3, 96, 96)
    found = training.masked_loss(model, images, 0.5, (0, 0, 1))
    if method == 'simmim':
        generator = np.random.default_rng((0, 0, 1))
        masks = np.stack([training.random_mask(9, 0.5, generator) for _ in images])
        assert len({mask.tobytes() for mask in masks}) > 1  # a mask for each image
        patches = torch.from_numpy(np.kron(masks.reshape(-1, 3, 3), np.ones((1, 8, 8)))).float()
        painted = model.neck(model.backbone(images, patches)[-1])
        units = painted.reshape(4, 3, 3, 32, 3, 32).permute(0, 2, 4, 3, 5, 1).reshape(4, 9, -1)
    else:
        generator = np.random.default_rng((0, 0, 1))
        mask = training.random_mask(9, 0.5, generator)
        masks = np.stack([mask] * 4)
        model.order = generator  # only the scrambled one draws from it
        units = model.reconstruct(images, mask)
    truth = images.reshape(4, 3, 3, 32, 3, 32).permute(0, 2, 4, 3, 5, 1).reshape(4, 9, -1)
    error = [
        float((units[i, u] - truth[i, u]).square().mean()) for i, u in np.argwhere(masks).tolist()
    ]
    torch.testing.assert_close(float(found), float(np.mean(error)), rtol=1e-5, atol=0)


def test_scrambled_features_land_at_other_units():
    torch.manual_seed(0)
    ours = training.build_model(TINY, 'greenmim').eval()
    theirs = training.build_model(TINY, 'scrambled').eval()
    theirs.load_state_dict(ours.state_dict())
    images, mask = torch.randn(2, 3, 96, 96), np.array([True, False, False] * 3)
    order = np.random.default_rng(5).permutation(6)
    assert (order != np.arange(6)).any()
    theirs.order = np.random.default_rng(5)
    features = ours.backbone(images, mask)
    expected = ours.neck(features[:, torch.from_numpy(order)], mask, (3, 3))
    torch.testing.assert_close(theirs.reconstruct(images, mask), expected)
    theirs.order = np.random.default_rng(5)
    assert not torch.allclose(ours.reconstruct(images, mask), theirs.reconstruct(images, mask))


@pytest.mark.parametrize('method', ['greenmim', 'simmim'])
def test_probed_backbone_is_the_pretrained_one(method):
    torch.manual_seed(0)
    model = training.build_model(TINY, method).eval()
    backbone = load_backbone(TINY, model.state_dict())
    images = torch.randn(2, 3, 96, 96)
    found = backbone(images)
    assert [map_.shape[2] for map_ in found] == [24, 12, 6, 3]
    expected = model.extract_feat(images)[-1]
    torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-5)
    weights = model.state_dict()
    del weights['backbone.patch_embed.projection.bias']
    with pytest.raises(StudyError, match=r'missing .*projection.bias'):
        load_backbone(TINY, weights)


def test_features_of_a_box_are_those_inside_it():
    class Places(torch.nn.Module):
        """Maps that hold their own coordinates."""

        def forward(self, images):
            maps = []
            for stride in (4, 8, 16, 32):
                side = images.shape[-1] // stride
                centre = (torch.arange(side) + 0.5) * stride
                grid = torch.stack(torch.meshgrid(centre, centre, indexing='ij'))
                maps.append(grid.expand(len(images), -1, -1, -1))
            return maps

    images = np.zeros((1, 96, 96, 3), np.uint8)
    corners = torch.tensor([[0, 32.0, 16.0, 64.0, 80.0]])
    for features in box_features(Places(), (images, corners, np.array([7])), 1)[:3]:
        np.testing.assert_allclose(features, [[48, 48]], atol=1e-3)
    assert normalise(np.full((1, 2, 2, 3), 255, np.uint8)).shape == (1, 3, 2, 2)


@needs_muon
def test_probe_of_every_milestone(places):
    cell = Cell('pretrain', 'greenmim', 0)
    with pytest.raises(StudyError, match='run its pre-training first'):
        probe(TINY, places, Cell('probe', 'greenmim', 5))
    training.pretrain(TINY, places, cell)
    found = probe(TINY, places, Cell('probe', 'greenmim', 0))
    assert [point['step'] for point in found] == [0, 4, 8]
    values = read_result(places, TINY, Cell('probe', 'greenmim', 0))
    assert values['milestones'] == found and min(values['digits']) >= 10
    for stage in found[-1]['stages']:
        assert 0 <= stage['linear'] <= 1 and 0 <= stage['neighbours'] <= 1

    # The longest pre-training as a small checkpoint; here there is one length.
    path, study = places.results / 'demo.pth', replace(TINY, lengths=(1,))
    with pytest.raises(StudyError, match='pretrain_greenmim_seed0_long4 is not finished here'):
        export(TINY, places, path)
    digest = export(study, places, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    saved = torch.load(path, weights_only=True)
    assert saved['meta']['steps'] == 8 and saved['meta']['images'] == 32
    weights = torch.load(places.folder(TINY, cell) / 'step_8.pth')['state_dict']
    for name, value in saved['state_dict'].items():
        torch.testing.assert_close(value.float(), weights[name].float(), rtol=1e-3, atol=1e-6)
    with pytest.raises(StudyError, match='pretrain_greenmim_seed0 is not finished here'):
        export(study, Places(path.parent / 'nowhere', places.state), path)


@pytest.mark.parametrize('method', ['greenmim', 'scrambled'])
def test_painting_leaves_what_is_visible(method):
    torch.manual_seed(0)
    model = training.build_model(TINY, method).eval()
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    mask = np.array([True, False, False] * 3)
    painted = paint(model, image, mask)
    assert painted.dtype == np.uint8 and painted.shape == image.shape
    np.testing.assert_array_equal(painted[:, 32:], image[:, 32:])
    # Where each predicted pixel belongs: the loss of the painted units is the model's own.
    error = (normalise(painted[None]) - normalise(image[None]))[..., :32].square().mean()
    units = model.reconstruct(normalise(image[None]), mask)[0, ::3]
    if method == 'greenmim':
        truth = normalise(image[None])[0, :, :, :32].reshape(3, 3, 32, 32).permute(1, 2, 3, 0)
        expected = (units.reshape(3, 32, 32, 3) - truth).square().mean()
        torch.testing.assert_close(error, expected, rtol=0.02, atol=0)


def test_a_seed_has_annotated_images_of_its_own(places):
    from study.detect import build_config

    build_data(TINY, places)
    chosen = [
        build_config(TINY, places, Cell('detect', 'scratch', seed, 10)).train_dataloader
        for seed in (0, 1, 2)
    ]
    indices = [set(loader.dataset.indices) for loader in chosen]
    assert [len(part) for part in indices] == [10, 10, 10]
    assert len(set.union(*indices)) == 30 and max(set.union(*indices)) == 29
    with pytest.raises(StudyError, match='labels=11: the study has 10 annotated images a seed'):
        build_config(TINY, places, Cell('detect', 'scratch', 0, 11))
    with pytest.raises(StudyError, match='run evidence.py pretrain --start simmim --seed 0'):
        build_config(TINY, places, Cell('detect', 'simmim', 0, 10))


def test_carried_weights_stand_for_the_pretraining_they_come_from_alone():
    study = Study()
    assert carried_weights(study, 'greenmim', 0, 4) == DEMO_CHECKPOINT
    for method, seed, length in (('greenmim', 0, 2), ('greenmim', 1, 4), ('simmim', 0, 4)):
        assert carried_weights(study, method, seed, length) is None
    other = replace(study, pretrain=replace(study.pretrain, lr_matrices=1e-3))
    assert carried_weights(other, 'greenmim', 0, 4) is None


def test_report_says_what_was_not_run(tmp_path):
    places = Places(tmp_path / 'docs/evidence', tmp_path / 'state')
    for start, seed, value in (('scratch', 0, 0.1), ('scratch', 1, 0.2), ('greenmim', 1, 0.26)):
        cell = Cell('detect', start, seed, 100)
        curve = [dict(iteration=5, loss=1.0, box=value, mask=value)]
        write_result(places, TINY, cell, dict(box_mAP=value, mask_mAP=value, dev=curve))
    text = write_report(TINY, places).read_text()
    assert '| 100 | from scratch | - | 0.150 ± 0.071 (2) | 0.150 ± 0.071 (2) |  |' in text
    assert '| 100 | GreenMIM | 8 | 0.260 (1) | 0.260 (1) | 0.060 (1) |' in text
    assert '| 100 | SimMIM | 8 | not run | not run | not run |' in text
    assert '| SimMIM | 0 | 8 | not run |' in text
    for name in ('labels', 'curves', 'probes'):
        assert (tmp_path / f'docs/images/evidence_{name}.png').stat().st_size > 1000


def test_gain_is_that_of_the_same_seed():
    study = Study()
    values = {('scratch', 0): 0.1, ('scratch', 2): 0.3, ('simmim', 1): 0.5, ('simmim', 2): 0.35}
    results = {
        Cell('detect', start, seed, 50): dict(box_mAP=value)
        for (start, seed), value in values.items()
    }
    assert gains(study, results, 'simmim', 50) == pytest.approx([0.05])
    assert Spread.of([]) is None and str(Spread.of([0.5])) == '0.500 (1)'
    assert str(Spread.of([0.4, 0.6])) == '0.500 ± 0.141 (2)'
    assert 'not run' in page(study, {})


def test_results_in_the_repository_are_of_this_version():
    places, study = Places(), Study()
    known = {f'{cell.name}.json': cell for cell in cells(study)}
    for path in places.results.glob('*.json'):
        values = read_result(places, study, known[path.name])
        assert json.dumps(values)


def test_demo_promises_what_was_measured():
    study = Study()
    found = gains(study, read_all(study, Places()), 'greenmim', 100, study.lengths[-1])
    assert len(found) == len(study.seeds)
    assert str(Spread.of(found)) == f'{MEASURED_GAIN} ({len(found)})'
