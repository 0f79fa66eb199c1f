"""The choices of ``greenmim pretrain``: pure functions of the request, the data and the machine."""

import json

import pytest

from greenmim_mm.cli.errors import UserError
from greenmim_mm.cli.pretraining.folder import resumed_request
from greenmim_mm.cli.pretraining.plan import (
    MODELS,
    Machine,
    Plan,
    Request,
    Start,
    bad_limit,
    choose_windows,
    make_plan,
)

CPU = Machine(0, False, 4)
H100 = Machine(1, True, 26, 'H100')
EIGHT = Machine(8, True, 128, 'H100')
OLD = Machine(1, False, 6, 'V100')


def plan(images=100_000, machine=H100, start=None, **settings) -> Plan:
    return make_plan(Request(('photos',), 'run', **settings), images, machine, start)


def refused(*args, **settings) -> str:
    with pytest.raises(UserError) as info:
        plan(*args, **settings)
    assert '\n' not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(
    ('model', 'machine', 'images', 'batch'),
    [
        ('swin-tiny', H100, 100_000, 128),
        ('swin-small', EIGHT, 100_000, 1024),
        ('swin-base', H100, 100_000, 64),
        ('swinv2-large', EIGHT, 100_000, 512),
        ('swin-tiny', CPU, 100_000, 32),
        ('swin-base', CPU, 100_000, 32),
        # Never more than half of the images, and the same on each device.
        ('swin-tiny', H100, 60, 30),
        ('swin-tiny', EIGHT, 60, 24),
        ('swin-tiny', CPU, 2, 1),
    ],
)
def test_batch(model, machine, images, batch):
    found = plan(images, machine, model=model)
    assert found.batch_size == batch
    assert found.device_batch * found.devices == batch
    assert 'batch_size' in found.reasons


@pytest.mark.parametrize(
    ('images', 'epochs'),
    [(1_281_167, 100), (128_000, 100), (64_000, 200), (20_000, 640), (7_000, 1600), (60, 1600)],
)
def test_epochs_follow_from_the_images(images, epochs):
    found = plan(images)
    assert found.epochs == epochs
    assert found.steps_per_epoch == images // found.batch_size
    assert found.warmup_steps == min(epochs // 10, 40) * found.steps_per_epoch


def test_few_steps_have_no_warmup():
    assert plan(60, CPU, epochs=2).warmup_steps == 0
    assert plan(60, CPU, epochs=2, batch_size=1).warmup_steps == 12


@pytest.mark.parametrize(
    ('model', 'rate'), [('swin-tiny', 1.5e-4), ('swin-base', 1.5e-4), ('swin-large', 1e-4)]
)
def test_learning_rate_is_that_of_the_batch(model, rate):
    assert plan(model=model, batch_size=512).lr == pytest.approx(2 * rate)
    assert plan(model=model, lr=3e-4).lr == 3e-4


@pytest.mark.parametrize(
    ('machine', 'asked', 'precision'),
    [
        (H100, 'auto', 'bf16'),
        (OLD, 'auto', 'fp16'),
        (CPU, 'auto', 'fp32'),
        (H100, 'fp32', 'fp32'),
        (H100, 'fp16', 'fp16'),
    ],
)
def test_precision(machine, asked, precision):
    assert plan(machine=machine, precision=asked).precision == precision


def test_workers_and_devices():
    assert (plan(machine=EIGHT).devices, plan(machine=EIGHT).workers) == (8, 8)
    assert plan(machine=OLD).workers == 6
    assert plan(machine=CPU, devices=4, batch_size=8).workers == 1
    assert plan(machine=CPU).devices == 1


@pytest.mark.parametrize(
    ('version', 'size', 'window', 'windows'),
    [
        (1, 224, None, (7, 7, 7, 7)),
        (2, 256, None, (8, 8, 8, 8)),
        (2, 224, None, (7, 7, 7, 7)),
        (1, 96, None, (3, 3, 3, 3)),
        (1, 256, None, (7, 7, 7, 7)),
        # The recipes' own: the last map is smaller.
        (1, 224, 14, (14, 14, 14, 7)),
        (2, 192, 12, (12, 12, 12, 6)),
    ],
)
def test_windows(version, size, window, windows):
    found, reason = choose_windows(version, size, window, None)
    assert found == windows
    assert (reason is None) == (window is not None)


def test_windows_of_a_checkpoint_are_kept_where_they_fit():
    start = Start('swin-base', (12, 12, 12, 12))
    assert plan(start=start, init='x', image_size=384).windows == (12, 12, 12, 12)
    assert plan(start=start, init='x').windows == (7, 7, 7, 7)
    assert plan(start=start, init='x').model == 'swin-base'


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(model='swin-bas'), 'did you mean swin-base'),
        (dict(window=15), 'from 1 to 7 fit all of them, and up to 14'),
        (dict(image_size=100), 'nearest are 96 and 128'),
        (dict(image_size=32), 'nearest are 64 and 96'),
        (dict(images=50, batch_size=64), 'more than the 50 images'),
        (dict(batch_size=65, machine=EIGHT), 'nearest are 64 and 72'),
        (dict(devices=2), 'there is 1 GPU here'),
        (dict(machine=CPU, devices=9), 'there are 4 CPU cores here'),
        (dict(machine=CPU, precision='fp16'), 'needs a GPU'),
        (dict(machine=OLD, precision='bf16'), 'V100 has no bf16; use fp16'),
        (dict(images=1), '1 image found in photos; give at least 2'),
        (dict(images=4, machine=EIGHT), 'too few for 8 devices'),
        (dict(model='swin-tiny', init='b.pth', start=Start('swin-base')), 'holds a swin-base'),
        (dict(init='b.pth', start=Start(None)), 'network of its own size'),
        (dict(export=('onnx',)), 'none of mmdet, timm'),
        (dict(epochs=0), '--epochs 0 must be at least 1'),
        (dict(lr=float('nan')), '--lr nan must be positive'),
        (dict(max_bad='150%'), '--max-bad 150%'),
    ],
)
def test_refusals_name_the_setting_and_the_remedy(settings, message):
    assert message in refused(**settings)


@pytest.mark.parametrize(
    ('text', 'limit'), [('1%', 0.01), ('0.5%', 0.005), ('7', 7), ('0.02', 0.02), ('0', 0)]
)
def test_bad_limit(text, limit):
    assert bad_limit(text) == pytest.approx(limit)
    assert bad_limit('100%') > 1e9


def test_every_line_of_the_plan_has_a_reason():
    lines = plan(60, CPU, epochs=2).describe()
    assert all(line.endswith(')') for line in lines)
    assert any('2, of 2 steps each' in line and line.endswith('(as you said)') for line in lines)
    assert any('30 images' in line and 'half of the 60 images' in line for line in lines)


@pytest.mark.parametrize('model', MODELS)
def test_survives_json(model):
    found = plan(model=model)
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_resume_takes_what_was_and_refuses_what_is_other():
    before = plan(60, CPU, epochs=3, seed=5)
    now = Request((), 'run')
    request = resumed_request(now, set(), before)
    assert make_plan(request, 60, CPU).to_dict() | dict(reasons={}) == before.to_dict() | dict(
        reasons={}
    )
    same = Request((), 'run', epochs=3, model='Swin_Tiny', workers=1, precision='auto')
    assert resumed_request(same, {'epochs', 'model', 'workers', 'precision'}, before).workers == 1
    other = Request((), 'run', epochs=4, seed=0, lr=1e-5)
    with pytest.raises(UserError) as info:
        resumed_request(other, {'epochs', 'seed'}, before)
    assert 'epochs 3 -> 4, seed 5 -> 0; ' in str(info.value)
    assert '--init run/exported' in str(info.value) and 'lr' not in str(info.value)
