"""tools/train.py, tools/test.py and the launchers, as they are called."""

import argparse
import errno
import importlib.util
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

from greenmim_mm.cli import runs
from greenmim_mm.cli.errors import UserError
from greenmim_mm.cli.train import make_parser
from greenmim_mm.datasets import DataError, check_dataset
from greenmim_mm.engine.checkpoints import CheckpointError
from greenmim_mm.engine.hooks import NonFiniteLossError
from greenmim_mm.models import GreenMIM

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / 'configs/custom/greenmim_swin-tiny-w7_1xb128-amp-coslr-100e_custom.py'
BASE = ROOT / 'configs/greenmim/greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py'
DETECTOR = ROOT / 'configs/mask_rcnn/mask-rcnn_greenmim-swin-base-w7_fpn_amp-ms-crop-3x_coco.py'
MMPRETRAIN = 'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py'
MMDET = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
SMALL_CONFIG = """
_base_ = {base!r}
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)
        )
    ),
    neck=dict(embed_dim=128, decoder_embed_dim=32, decoder_num_heads=2),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(
        data_root={data!r},
        pipeline=[
            dict(type='greenmim_mm.LoadImageFromFile'),
            dict(type='RandomResizedCrop', scale=96),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs'),
        ],
    ),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-3))
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
log_processor = dict(window_size=1)
"""


@pytest.fixture(autouse=True)
def no_traces_of_the_runner():
    """A runner's seed and iteration would reach the masks of later tests."""
    yield
    for manager in (MessageHub, DefaultScope, MMLogger, Visualizer):
        manager._instance_dict.clear()


@pytest.fixture
def tools(monkeypatch):
    """``tools(name)`` imports tools/<name>.py, under a name that hides no other module."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))

    def load(name):
        spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / f'tools/{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Four images at two depths, no labels."""
    root = tmp_path_factory.mktemp('images')
    (root / 'more' / 'of them').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ('a.jpg', 'b.PNG', 'more/c.jpeg', 'more/of them/d.jpg'):
        smooth = cv2.resize(rng.integers(0, 256, (5, 5, 3), np.uint8), (120, 100))
        assert cv2.imwrite(str(root / name), smooth)
    return root


@pytest.fixture
def small_config(tmp_path, images):
    path = tmp_path / 'small.py'
    path.write_text(SMALL_CONFIG.format(base=str(TINY), data=str(images)))
    return path


def run_tool(name: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / 'tools' / f'{name}.py', *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def refused(tool, capsys, *args: object) -> str:
    """The line that the tool ends with; nothing else is on stderr."""
    with pytest.raises(SystemExit) as exit_info:
        tool.main([str(arg) for arg in args])
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert ': error: ' in lines[0] and 'Traceback' not in lines[0]
    return lines[0]


def scalars(work_dir: Path) -> list[dict]:
    """What the last run in a work dir has logged, iteration by iteration."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(work_dir: Path) -> list[float]:
    """Losses of the last run in a work dir."""
    return [record['loss'] for record in scalars(work_dir)]


def test_resumed_run_equals_the_uninterrupted_one(tools, small_config, tmp_path, monkeypatch):
    masks = []
    draw_mask = GreenMIM.draw_mask

    def draw_and_record(self, grid):
        masks.append(draw_mask(self, grid))
        return masks[-1]

    monkeypatch.setattr(GreenMIM, 'draw_mask', draw_and_record)
    train = tools('train')

    def run(work_dir, epochs, *args):
        masks.clear()
        time.sleep(1.1)  # runs are named by the second: two of a name would share their logs
        train.main(
            [
                str(small_config),
                f'--work-dir={tmp_path / work_dir}',
                *map(str, args),
                '--cfg-options',
                f'train_cfg.max_epochs={epochs}',
            ]
        )
        return losses(tmp_path / work_dir), [mask.hidden.tolist() for mask in masks]

    whole, whole_masks = run('whole', 3)
    assert len(whole) == len(whole_masks) == 6
    assert len(set(map(tuple, whole_masks))) > 1
    first, first_masks = run('interrupted', 1)
    assert first_masks == whole_masks[:2]
    assert first == pytest.approx(whole[:2], rel=1e-6)

    rest, rest_masks = run('interrupted', 2, '--resume')
    assert rest_masks == whole_masks[2:4]
    assert rest == pytest.approx(whole[2:4], rel=1e-6)

    elsewhere, elsewhere_masks = run(
        'elsewhere', 3, '--resume', tmp_path / 'interrupted' / 'epoch_2.pth'
    )
    assert elsewhere_masks == whole_masks[4:]
    assert elsewhere == pytest.approx(whole[4:], rel=1e-6)
    final = [
        torch.load(tmp_path / name / 'epoch_3.pth', weights_only=False)['state_dict']
        for name in ('whole', 'elsewhere')
    ]
    for name, value in final[0].items():
        torch.testing.assert_close(final[1][name], value)


def test_command_line_with_workers_and_damaged_images(small_config, images, tmp_path):
    """The names survive the way out of a worker process."""
    data, run = tmp_path / 'data', tmp_path / 'run'
    data.mkdir()
    for name in 'abcd':
        (data / f'{name}.jpg').write_bytes((images / 'a.jpg').read_bytes())
    (data / 'bad.jpg').touch()
    (data / 'cut.jpg').write_bytes((images / 'a.jpg').read_bytes()[:-400])
    args = (
        *(small_config, f'--work-dir={run}', '--cfg-options'),
        *(f'train_dataloader.dataset.data_root={data}', 'train_dataloader.num_workers=1'),
    )
    result = run_tool('train', *args, 'train_cfg.max_epochs=1')
    assert result.returncode == 0, result.stderr
    assert len(losses(run)) == 3  # others stand in
    lines = (run / 'bad_images.txt').read_text().splitlines()
    assert sorted(line.split('\t')[0] for line in lines) == [
        str(data / 'bad.jpg'),
        str(data / 'cut.jpg'),
    ]
    result = run_tool('train', *args, 'train_dataloader.dataset.max_bad=1')
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert 'error: 2 of 6 images cannot be used, more than the 1' in line
    assert str(data / 'bad.jpg') in line and str(run / 'bad_images.txt') in line
    assert 'Traceback' not in result.stderr


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    """tools/analysis/stress_interruption.py, its config, and a run that was left alone."""
    path = ROOT / 'tools/analysis/stress_interruption.py'
    spec = importlib.util.spec_from_file_location('stress_interruption', path)
    stress = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stress)
    folder = tmp_path_factory.mktemp('killed')
    config = stress.make_config(folder)
    stress.finish(config, folder / 'whole')
    return stress, config, folder


def test_killed_twice(killed):
    """kill -9 in the middle of an epoch, twice, each time with what --resume makes of it."""
    stress, config, folder = killed
    work_dir = folder / 'killed'
    for iteration in (5, stress.STEPS + 5):
        process = stress.start(config, work_dir)
        assert stress.wait_for(work_dir, iteration, process)
        stress.kill(process)
        assert max(stress.losses(work_dir)) < stress.EPOCHS * stress.STEPS
    stress.finish(config, work_dir)
    stress.compare(folder / 'whole', work_dir)
    # Some iterations were run twice, with the same loss.
    assert any(len(values) > 1 for values in stress.losses(work_dir).values())


def test_terminated_with_its_workers(killed):
    """A scheduler signals every process of a job, workers of the loader as well."""
    stress, config, folder = killed
    work_dir = folder / 'terminated'
    process = stress.start(config, work_dir)
    assert stress.wait_for(work_dir, 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    log = work_dir.with_suffix('.log').read_text()
    assert 'Traceback' not in log
    last = log.strip().splitlines()[-1]
    assert last.startswith('train.py: SIGTERM after iteration ') and '--resume' in last
    stress.finish(config, work_dir)
    stress.compare(folder / 'whole', work_dir)
    assert all(len(values) == 1 for values in stress.losses(work_dir).values())


@pytest.mark.parametrize('content', [b'', b'no checkpoint', None], ids=['empty', 'words', 'cut'])
def test_damaged_checkpoint_is_one_line(tools, capsys, small_config, tmp_path, content):
    path = tmp_path / 'epoch_1.pth'
    torch.save(dict(meta=dict(epoch=1, iter=2), state_dict=dict(x=torch.ones(3))), path)
    path.write_bytes(path.read_bytes()[:-50] if content is None else content)
    train = tools('train')
    line = refused(train, capsys, small_config, '--resume', path)
    assert f'checkpoint {path} is damaged' in line and '--resume alone' in line
    with pytest.raises(SystemExit) as exit_info:
        train.main([str(small_config), f'--work-dir={tmp_path}', '--resume'])
    assert exit_info.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f'no checkpoint in {tmp_path} is whole: {path}' in line


def test_mmcvs_error_about_an_image_ends_in_one_line(capsys):
    """mmdet's recipes load with mmcv's transform; other assertions are no user's fault."""
    parser = argparse.ArgumentParser(prog='train.py')
    text = 'Caught AssertionError in a worker.\nAssertionError: failed to load image: a.jpg'
    with pytest.raises(SystemExit) as exit_info, runs.errors_of_runs(parser):
        raise AssertionError(text)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == 'train.py: error: failed to load image: a.jpg\n'
    with pytest.raises(AssertionError), runs.errors_of_runs(parser):
        raise AssertionError('another')


@pytest.mark.parametrize('kind', [CheckpointError, NonFiniteLossError])
def test_what_a_run_cannot_go_on_with_is_one_line(capsys, kind):
    parser = argparse.ArgumentParser(prog='train.py')
    with pytest.raises(SystemExit) as exit_info, runs.errors_of_runs(parser):
        raise kind('so it\nis')
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == 'train.py: error: so it is\n'


def test_full_disk_where_logs_are_written_is_one_line(capsys):
    parser = argparse.ArgumentParser(prog='train.py')
    with pytest.raises(SystemExit) as exit_info, runs.errors_of_runs(parser):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert exit_info.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith('train.py: error: No space left on device; make room')
    assert '--resume' in line
    with pytest.raises(PermissionError), runs.errors_of_runs(parser):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def test_config_not_found(tools, capsys):
    train = tools('train')
    assert 'config configs/no.py does not exist' in refused(train, capsys, 'configs/no.py')
    line = refused(train, capsys, 'mmdet::swin/no.py')
    assert 'mmdet::swin/no.py does not exist' in line and '.mim' in line
    assert "'nobody' is not installed" in refused(train, capsys, 'nobody::swin/no.py')


def test_inherited_config_not_found(tools, capsys, tmp_path):
    (tmp_path / 'config.py').write_text("_base_ = './no.py'\n")
    assert 'no.py' in refused(tools('train'), capsys, tmp_path / 'config.py')


def test_resume_path_not_found(tools, capsys, small_config, tmp_path):
    line = refused(tools('train'), capsys, small_config, '--resume', tmp_path / 'no.pth')
    assert f'checkpoint {tmp_path / "no.pth"} does not exist' in line


def test_data_folder_missing_or_empty(tools, capsys, small_config, tmp_path):
    train = tools('train')
    option = 'train_dataloader.dataset.data_root'

    def line(folder):
        return refused(train, capsys, small_config, '--cfg-options', f'{option}={folder}')

    folder = tmp_path / 'data'
    assert f'data folder {folder} of train_dataloader.dataset does not exist' in line(folder)
    assert f'--cfg-options {option}=FOLDER' in line(folder)
    (folder / 'inner').mkdir(parents=True)
    (folder / 'inner' / 'notes.txt').touch()
    assert f'data folder {folder} of train_dataloader.dataset has no image' in line(folder)
    assert option in line(folder)


def test_imagenet_recipe_names_its_folder(tools, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(tools('train'), capsys, BASE, '--cfg-options', 'optim_wrapper.type=OptimWrapper')
    assert 'data folder data/imagenet/train' in line


@pytest.mark.parametrize('wrap', [False, True])
def test_coco_files_missing(tmp_path, wrap):
    dataset = dict(
        type='CocoDataset',
        data_root=f'{tmp_path}/',
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
    )
    name = 'loader.dataset'
    if wrap:
        dataset, name = dict(type='RepeatDataset', times=2, dataset=dataset), f'{name}.dataset'

    def message():
        with pytest.raises(DataError) as error_info:
            check_dataset(dataset, 'loader.dataset')
        assert f'--cfg-options {name}.data_root=FOLDER' in str(error_info.value)
        return str(error_info.value)

    assert f'data folder {tmp_path}/train/ of {name} does not exist' in message()
    (tmp_path / 'train').mkdir()
    assert f'annotation file {tmp_path}/annotations/train.json' in message()
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations' / 'train.json').touch()
    assert f'data folder {tmp_path}/train/ of {name} has no image' in message()
    (tmp_path / 'train' / '1.jpg').touch()
    check_dataset(dataset)


def test_data_that_is_not_ours_to_judge(images, tmp_path):
    check_dataset(dict(type='CIFAR10', data_root=str(tmp_path / 'to be downloaded')))
    check_dataset(dict(type='ImageNet', data_root='s3://bucket/imagenet', split='train'))
    check_dataset(dict(type='mmpretrain.ImageNet', data_root=str(images), data_prefix='more'))
    with pytest.raises(DataError, match='in the folders of classes'):
        check_dataset(dict(type='CustomDataset', data_root=str(images / 'more' / 'of them')))


def test_mixed_precision_without_gpu(tools, capsys, small_config, monkeypatch):
    train = tools('train')
    monkeypatch.setattr(runs, 'get_device', lambda: 'cpu')
    line = refused(train, capsys, small_config, '--amp')
    assert '--cfg-options optim_wrapper.type=OptimWrapper' in line


def test_missing_pretrained_checkpoint(monkeypatch, tmp_path):
    cfg = Config.fromfile(DETECTOR)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error_info:
        runs.check_pretrained(cfg.model)
    message = str(error_info.value)
    assert 'epoch_200.pth does not exist' in message
    assert 'model.backbone.init_cfg.checkpoint=PATH' in message
    runs.check_pretrained(Config.fromfile(runs.find_config(MMDET)).model)  # a URL


def test_auto_scale_lr(tools, capsys, small_config, tmp_path):
    args = [str(small_config), f'--work-dir={tmp_path}', '--auto-scale-lr']
    cfg = runs.training_config(make_parser().parse_args(args))
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=128)
    line = refused(tools('train'), capsys, *args, '--cfg-options', 'auto_scale_lr=None')
    assert '--cfg-options auto_scale_lr.base_batch_size=N' in line


@pytest.mark.parametrize('counts', [1, 4])
def test_learning_rate_is_scaled_to_the_batch_of_an_update(tools, small_config, tmp_path, counts):
    """mmengine counts the 2 images of a step, not the steps that an update accumulates."""
    tools('train').main(
        [
            *(str(small_config), f'--work-dir={tmp_path / "run"}', '--auto-scale-lr'),
            *('--cfg-options', 'train_cfg.max_epochs=1', 'param_scheduler=None'),
            *('auto_scale_lr.base_batch_size=16', f'optim_wrapper.accumulative_counts={counts}'),
        ]
    )
    (record, _) = scalars(tmp_path / 'run')
    assert record['lr'] == pytest.approx(1e-3 * 2 * counts / 16)
    # Read again, the stored config must not be scaled twice.
    stored = Config.fromfile(tmp_path / 'run' / 'small.py')
    assert stored.auto_scale_lr.base_batch_size == 16


def test_strategies_do_not_count_accumulated_steps(tmp_path):
    cfg = Config(
        dict(
            strategy=dict(type='DeepSpeedStrategy', gradient_accumulation_steps=2),
            auto_scale_lr=dict(enable=True, base_batch_size=8),
        )
    )
    with pytest.raises(UserError, match='--auto-scale-lr: with strategy=DeepSpeedStrategy'):
        runs.check_accumulation(cfg)
    cfg.strategy.gradient_accumulation_steps = 1
    runs.check_accumulation(cfg)


def test_finished_run_says_so(tools, small_config, tmp_path, capsys, monkeypatch):
    """Without data, and without building anything; epochs and iterations alike."""
    work_dir = tmp_path / 'run'
    work_dir.mkdir()
    checkpoint = work_dir / 'epoch_3.pth'
    torch.save(dict(meta=dict(epoch=3, iter=6), state_dict=dict(x=torch.ones(3))), checkpoint)
    (work_dir / 'last_checkpoint').write_text(str(checkpoint))
    train = tools('train')
    monkeypatch.setattr(runs, 'build_runner', lambda cfg: pytest.fail('starts again'))

    def run(*options, resume=('--resume',)):
        options = ('train_dataloader.dataset.data_root=nowhere', *options)
        args = [small_config, f'--work-dir={work_dir}', *resume, '--cfg-options', *options]
        train.main([str(arg) for arg in args])
        return capsys.readouterr().out

    for resume in (('--resume',), ('--resume', checkpoint)):
        told = run('train_cfg.max_epochs=3', resume=resume)
        assert told.startswith(f'{checkpoint} is finished (epoch 3 of 3)')
        assert 'raise train_cfg.max_epochs' in told
    told = run('train_cfg._delete_=True', 'train_cfg.by_epoch=False', 'train_cfg.max_iters=5')
    assert '(iter 6 of 5)' in told
    # One that can go on gets as far as its data.
    assert 'data folder nowhere' in refused(
        *(train, capsys, small_config, f'--work-dir={work_dir}', '--resume', '--cfg-options'),
        *('train_dataloader.dataset.data_root=nowhere', 'train_cfg.max_epochs=4'),
    )
    # A folder that was moved knows its own.
    moved = work_dir.rename(tmp_path / 'moved')
    work_dir = moved
    told = run('train_cfg.max_epochs=3')
    assert told.startswith(f'{moved / checkpoint.name} is finished (epoch 3 of 3)')
    # What is wrong with a checkpoint is said elsewhere.
    cfg = Config(dict(resume=True, load_from=str(small_config), train_cfg=dict(max_epochs=3)))
    assert runs.finished(cfg) == ''


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def test_one_of_two_processes_is_terminated(killed):
    """All agree: the run ends after one and the same iteration, saved once, and can go on."""
    stress, config, folder = killed
    work_dir = folder / 'two'
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2']
    command += [f'--master_port={port}', ROOT / 'tools/train.py', config, f'--work-dir={work_dir}']
    command += ['--launcher=pytorch', '--cfg-options', 'train_cfg.max_epochs=100']
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    log = folder / 'two.log'
    with open(log, 'wb') as file:
        launcher = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    assert stress.wait_for(work_dir, 3, launcher)
    second = children(launcher.pid)[1]
    assert b'LOCAL_RANK=1' in Path(f'/proc/{second}/environ').read_bytes()
    os.kill(second, signal.SIGTERM)
    assert launcher.wait(timeout=120) != 0
    last = max(stress.losses(work_dir))
    (saved,) = work_dir.glob('interrupted_iter_*.pth')
    assert saved.stem == f'interrupted_iter_{last}'
    assert log.read_text().count(f'SIGTERM after iteration {last} of') == 1
    assert runs.last_checkpoint(work_dir) == saved


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def test_processes_without_gpus(small_config, images, tmp_path):
    """Three processes meet by gloo, train one model on data that no three share, and end alike."""
    data = tmp_path / 'data'
    shutil.copytree(images, data)
    # 4 images in batches of 2 for 3 processes, and of one that is bad another takes the place.
    (data / 'a.jpg').write_bytes(b'')
    # No GPU shows, and each process has a thread, as torch wants it.
    env = dict(os.environ, PYTHON=sys.executable, MASTER_PORT=str(free_port()),
               CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')  # fmt: skip
    result = subprocess.run(
        [
            *('bash', ROOT / 'tools/dist_train.sh', small_config, '3'),
            *(f'--work-dir={tmp_path / "run"}', '--cfg-options', 'train_cfg.max_epochs=2'),
            f'train_dataloader.dataset.data_root={data}',
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / 'run')) == 2
    assert (tmp_path / 'run' / 'epoch_2.pth').exists()
    (line,) = (tmp_path / 'run' / 'bad_images.txt').read_text().splitlines()
    assert line.startswith(f'{data / "a.jpg"}\t')


def test_one_of_three_processes_dies(killed):
    """The job ends within a minute, says which process it was and of what, and can go on."""
    stress, config, folder = killed
    work_dir = folder / 'three'
    env = dict(os.environ, PYTHON=sys.executable, MASTER_PORT=str(free_port()),
               CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')  # fmt: skip
    command = ['bash', ROOT / 'tools/dist_train.sh', config, '3', f'--work-dir={work_dir}']
    command += ['--cfg-options', 'train_cfg.max_epochs=100']
    log = folder / 'three.log'
    with open(log, 'wb') as file:
        launcher = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    assert stress.wait_for(work_dir, 4, launcher)
    members = children(launcher.pid)
    (victim,) = (
        pid for pid in members if b'LOCAL_RANK=2' in Path(f'/proc/{pid}/environ').read_bytes()
    )
    start = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0
    assert time.monotonic() - start < 60
    assert not [pid for pid in members if Path(f'/proc/{pid}').exists()]
    text = log.read_text()
    assert 'SIGKILL' in text and f'pid: {victim}' in text and 'local_rank: 2' in text
    assert runs.last_checkpoint(work_dir) is not None


def test_launchers_that_need_gpus(monkeypatch):
    monkeypatch.setattr(runs, 'is_distributed', lambda: False)
    monkeypatch.setattr(runs, 'get_device', lambda: 'cpu')
    with pytest.raises(UserError, match='--launcher slurm needs GPUs.*torchrun'):
        runs.build_runner(Config(dict(launcher='slurm')))
    monkeypatch.setattr(runs, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match='process 2 of this machine has no GPU: start 2'):
        runs.build_runner(Config(dict(launcher='pytorch')))


@pytest.mark.parametrize(
    'name, scope', [(MMPRETRAIN, 'mmpretrain'), (MMDET, 'mmdet'), (str(TINY), 'mmpretrain')]
)
def test_config_of_another_package(name, scope, monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    args = [name, '--local_rank=3', '--cfg-options', 'val_dataloader=None']
    cfg = runs.load_config(make_parser().parse_args(args))
    assert cfg.default_scope == scope
    assert cfg.work_dir == f'work_dirs/{Path(name).stem}'
    # Only mmpretrain's data sets return what default_collate takes.
    assert ('collate_fn' in cfg.train_dataloader) == (scope == 'mmpretrain')
    assert os.environ['LOCAL_RANK'] == '3'


def test_training_with_a_config_of_mmpretrain(tools, images, tmp_path):
    (tmp_path / 'train.txt').write_text('a.jpg 3\nmore/c.jpeg 5\n')
    tools('train').main(
        [
            MMPRETRAIN,
            f'--work-dir={tmp_path}',
            '--cfg-options',
            f'train_dataloader.dataset.data_root={images}',
            'train_dataloader.dataset.data_prefix=.',
            f'train_dataloader.dataset.ann_file={tmp_path / "train.txt"}',
            'train_dataloader.batch_size=2',
            'train_dataloader.num_workers=0',
            'train_cfg.max_epochs=1',
            'default_hooks.logger.interval=1',
            'default_hooks.checkpoint=None',
            'val_cfg=None',
            'val_dataloader=None',
            'val_evaluator=None',
        ]
    )
    assert len(losses(tmp_path)) == 1


def test_testing_a_detector(tools, tmp_path):
    """mmdet's recipe through tools/test.py, with the predictions written."""
    root = tmp_path / 'coco'
    (root / 'val2017').mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert cv2.imwrite(str(root / 'val2017' / '1.jpg'), image)
    annotations = dict(
        images=[dict(id=1, file_name='1.jpg', height=64, width=64)],
        annotations=[
            dict(id=1, image_id=1, category_id=1, iscrowd=0, area=900, bbox=[10, 10, 30, 30])
            | dict(segmentation=[[10, 10, 40, 10, 40, 40, 10, 40]])
        ],
        # All of COCO's: an untrained detector finds any of them.
        categories=[dict(id=i, name=n) for i, n in enumerate(CocoDataset.METAINFO['classes'], 1)],
    )
    (root / 'annotations').mkdir()
    path = root / 'annotations' / 'instances_val2017.json'
    path.write_text(json.dumps(annotations))
    checkpoint, out = tmp_path / 'none.pth', tmp_path / 'out.pkl'
    torch.save(dict(state_dict={}), checkpoint)
    tools('test').main(
        [
            str(DETECTOR),
            str(checkpoint),
            f'--out={out}',
            f'--work-dir={tmp_path / "run"}',
            '--cfg-options',
            f'test_dataloader.dataset.data_root={root}/',
            'test_dataloader.num_workers=0',
            f'test_evaluator.ann_file={path}',
            'test_dataloader.dataset.pipeline.1.scale=(128,128)',
            'model.backbone.embed_dims=32',
            'model.backbone.depths=[1,1,1,1]',
            'model.backbone.num_heads=[1,2,4,8]',
            'model.neck.in_channels=[32,64,128,256]',
            'model.test_cfg.rpn.max_per_img=10',
            'model.test_cfg.rcnn.score_thr=0.0',
        ]
    )
    (metrics_file,) = (tmp_path / 'run').glob('*/*.json')
    assert 'coco/segm_mAP' in json.loads(metrics_file.read_text())
    (prediction,) = pickle.loads(out.read_bytes())
    assert prediction['img_id'] == 1
    assert 'counts' in prediction['pred_instances']['masks'][0]


def test_test_tool_refuses(tools, capsys, small_config, tmp_path):
    tool = tools('test')
    assert 'nothing to test' in refused(tool, capsys, small_config, tmp_path / 'no.pth')
    line = refused(tool, capsys, DETECTOR, tmp_path / 'no.pth')
    assert f'checkpoint {tmp_path / "no.pth"} does not exist' in line
    line = refused(tool, capsys, DETECTOR, 'no.pth', '--out', 'predictions.json')
    assert '--out predictions.json' in line
    (tmp_path / 'yes.pth').touch()
    line = refused(
        tool,
        capsys,
        DETECTOR,
        tmp_path / 'yes.pth',
        '--cfg-options',
        f'test_dataloader.dataset.data_root={tmp_path}/coco/',
    )
    assert f'data folder {tmp_path}/coco/val2017/' in line


@pytest.mark.parametrize(
    'script, args, expected',
    [
        (
            'dist_train.sh',
            ['config.py', '8', '--resume', '--cfg-options', 'a=b c'],
            '--nproc_per_node=8|tools/train.py|config.py|--launcher|pytorch|--resume|'
            '--cfg-options|a=b c',
        ),
        (
            'dist_test.sh',
            ['config.py', 'last.pth', '4', '--out', 'x.pkl'],
            '--nproc_per_node=4|tools/test.py|config.py|last.pth|--launcher|pytorch|--out|x.pkl',
        ),
        (
            'slurm_train.sh',
            ['gpu', 'job', 'config.py', 'run', '--amp'],
            '--cpus-per-task=8|--kill-on-bad-exit=1|--qos=high|python|-u|tools/train.py|'
            'config.py|--work-dir|run|--launcher|slurm|--amp',
        ),
    ],
)
def test_launchers(script, args, expected, tmp_path):
    """What they call, seen by stand-ins for python and srun."""
    for name in ('python', 'srun'):
        (tmp_path / name).write_text('#!/bin/sh\nfor a; do printf "%s|" "$a"; done\n')
        (tmp_path / name).chmod(0o755)
    env = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', SRUN_ARGS='--qos=high')
    env.pop('PYTHON', None)
    command = [f'tools/{script}', *args]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f'|{expected}|'), result.stdout

    result = subprocess.run(command[:2], env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and 'usage: ' in result.stderr
