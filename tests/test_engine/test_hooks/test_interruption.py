"""Runs that are interrupted, and go on as if they had not been."""

import os
import shutil
import signal

import pytest
import torch
from small_runs import STEPS, AtIteration, assert_same, config, interrupt_at, train

from greenmim_mm.engine.hooks import Interruption, ResumeError


@pytest.mark.parametrize('workers', [0, 2])
def test_resumed_in_the_middle_of_an_epoch(folder, tmp_path, whole, workers):
    """Two interruptions: mid-epoch and at an epoch's very end; losses and weights are equal."""
    losses, final = whole
    assert sorted(losses) == list(range(3 * STEPS))
    cfg = config(tmp_path, folder, workers=workers, checkpoint=dict(max_keep_ckpts=1))
    seen = {}
    for iteration, number in ((1, signal.SIGTERM), (2 * STEPS - 1, signal.SIGINT)):
        interrupt_at(iteration, number)
        with pytest.raises(Interruption) as error_info:
            train(cfg, resume=True)
        assert error_info.value.code == 128 + number
        assert f'saved {tmp_path}/interrupted_iter_{iteration + 1}.pth' in str(error_info.value)
        assert max(AtIteration.losses) == iteration and not seen.keys() & AtIteration.losses.keys()
        seen |= AtIteration.losses
        assert signal.getsignal(number) is not None
    AtIteration.actions = {}
    rest, weights_now = train(cfg, resume=True)
    seen |= rest
    assert seen == losses
    assert_same(weights_now, final)
    # The checkpoints of the interruptions are gone, the last regular one is left.
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['epoch_3.pth']


def test_checkpoints_by_iteration(folder, tmp_path, whole):
    cfg = config(tmp_path, folder, checkpoint=dict(by_epoch=False, interval=4, max_keep_ckpts=2))
    losses, final = train(cfg)
    assert losses == whole[0]
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['iter_12.pth', 'iter_15.pth']
    rest, again = train(cfg, resume=tmp_path / 'iter_12.pth')
    assert rest == {k: v for k, v in losses.items() if k >= 12}
    assert_same(again, final)


def test_signals_of_every_kind(folder, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGINT)]
    interrupt_at(2, signal.SIGUSR1)
    with pytest.raises(Interruption) as error_info:
        train(config(tmp_path, folder))
    assert error_info.value.code == 128 + signal.SIGUSR1
    assert 'SIGUSR1 after iteration 3 of 15' in str(error_info.value)
    assert '--resume' in str(error_info.value)
    assert before == [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGINT)]

    def twice(runner):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    AtIteration.actions = {0: twice}
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, folder))


def test_signals_are_as_before_whatever_ends_a_run(folder, tmp_path):
    def fail(runner):
        raise RuntimeError('something else')

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    AtIteration.actions = {1: fail}
    with pytest.raises(RuntimeError, match='something else'):
        train(config(tmp_path, folder))
    assert [signal.getsignal(number) for number in numbers] == before
    # The run listened until then.
    AtIteration.actions = {1: lambda runner: before.append(signal.getsignal(signal.SIGTERM))}
    train(config(tmp_path, folder))
    assert before[-1] not in before[:-1]


def test_gradients_that_are_added_up_are_not_cut(folder, tmp_path):
    cfg = config(tmp_path, folder, epochs=2)
    cfg.optim_wrapper.accumulative_counts = 3
    losses, final = train(cfg.copy())
    shutil.rmtree(tmp_path)
    interrupt_at(3)
    with pytest.raises(Interruption, match='after iteration 6'):
        train(cfg)
    AtIteration.actions = {}
    rest, again = train(cfg, resume=True)
    assert rest == {k: v for k, v in losses.items() if k >= 6}
    assert_same(again, final)


def test_another_batch_size_is_refused(folder, tmp_path):
    train(config(tmp_path, folder, epochs=1))
    with pytest.raises(ResumeError) as error_info:
        train(config(tmp_path, folder, epochs=2, batch=5), resume=True)
    message = str(error_info.value)
    assert 'a run with 2 images in a step, this one has 5' in message
    assert 'train_dataloader.batch_size=2 ' in message and '\n' not in message
    # A checkpoint of mmengine alone does not say how large its batch was.
    path = tmp_path / 'epoch_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['message_hub']['runtime_info'].pop('images_of_a_step')
    torch.save(checkpoint, path)
    with pytest.raises(ResumeError, match='stands at iteration 5 in epoch 2, but 2 iterations'):
        train(config(tmp_path, folder, epochs=2, batch=5), resume=True)
