"""tools/train.py as it is called, within this process: configs, data, resuming."""

import argparse
import errno
import os
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from tool_runs import DETECTOR, ROOT, TINY, losses, refused, scalars

from greenmim_mm.cli import runs
from greenmim_mm.cli.errors import UserError
from greenmim_mm.cli.train import make_parser
from greenmim_mm.datasets import DataError, check_dataset
from greenmim_mm.engine.checkpoints import CheckpointError
from greenmim_mm.engine.hooks import NonFiniteLossError
from greenmim_mm.models import GreenMIM

BASE = ROOT / 'configs/greenmim/greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py'
MMPRETRAIN = 'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py'
MMDET = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'


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
