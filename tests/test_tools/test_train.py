"""tools/train.py, tools/test.py and the launchers, as they are called."""

import argparse
import importlib.util
import json
import os
import pickle
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
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.visualization import Visualizer

from greenmim_mm.cli import runs
from greenmim_mm.cli.errors import UserError
from greenmim_mm.cli.train import make_parser
from greenmim_mm.datasets import DataError, UnreadableImageError, check_dataset
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
        # Nothing random: what the masks are shows in the losses alone.
        pipeline=[
            dict(type='greenmim_mm.LoadImageFromFile'),
            dict(type='Resize', scale=(96, 96)),
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


def test_command_line_with_workers_and_a_damaged_image(small_config, images, tmp_path):
    """The path survives the way out of a worker process."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'good.jpg').write_bytes((images / 'a.jpg').read_bytes())
    bad = tmp_path / 'data' / 'bad.jpg'
    bad.touch()
    result = run_tool(
        'train',
        small_config,
        f'--work-dir={tmp_path / "run"}',
        '--cfg-options',
        f'train_dataloader.dataset.data_root={tmp_path / "data"}',
        'train_dataloader.num_workers=1',
    )
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert f'error: image {bad} cannot be read; replace or remove the file' in line
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(
    'content', [b'', b'no image at all', None], ids=['empty', 'garbage', 'missing']
)
def test_unreadable_image_is_named(content, tmp_path):
    path = tmp_path / 'image.jpg'
    if content is not None:
        path.write_bytes(content)
    loader = TRANSFORMS.build(dict(type='greenmim_mm.LoadImageFromFile'))
    with pytest.raises(UnreadableImageError, match='image.jpg cannot be read') as error_info:
        loader(dict(img_path=str(path)))
    assert '\n' not in str(error_info.value)


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


def test_readable_image_is_loaded(images):
    loader = TRANSFORMS.build(dict(type='greenmim_mm.LoadImageFromFile'))
    assert loader(dict(img_path=str(images / 'a.jpg')))['img'].shape == (100, 120, 3)


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
    # Whatever else is wrong with a checkpoint is the runner's to say.
    checkpoint.write_bytes(b'no checkpoint')
    cfg = Config(dict(resume=True, work_dir=str(work_dir), train_cfg=dict(max_epochs=3)))
    assert runs.finished(cfg) == ''


def test_processes_without_gpus(small_config, tmp_path):
    """The launcher, on CPUs: two processes meet by gloo and train one model."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    # No GPU shows, and each process has a thread, as torch wants it.
    env = dict(os.environ, PYTHON=sys.executable, MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES='')
    result = subprocess.run(
        [
            *('bash', ROOT / 'tools/dist_train.sh', small_config, '2'),
            *(f'--work-dir={tmp_path / "run"}', '--cfg-options', 'train_cfg.max_epochs=1'),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / 'run')) == 1  # 4 images, 2 processes with 2 each
    assert (tmp_path / 'run' / 'epoch_1.pth').exists()


def test_launchers_that_need_gpus(monkeypatch):
    monkeypatch.setattr(runs, 'is_distributed', lambda: False)
    monkeypatch.setattr(runs, 'get_device', lambda: 'cpu')
    with pytest.raises(UserError, match='--launcher slurm needs GPUs.*tools/dist_train.sh'):
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
