"""``greenmim pretrain`` on very little: files, exports, interruptions, resuming, bad input."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import OPTIONS, SMALL, command, same, start, weights
from mmengine.config import Config
from PIL import Image

import greenmim_mm
from greenmim_mm.cli.train import main as train
from greenmim_mm.verification import verify


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        command('pretrain', *arguments)
    err = capsys.readouterr().err
    assert info.value.code == 2, err
    assert err.count('\n') == 1 and ': error: ' in err
    return err


def wait_for(path: Path, process) -> None:
    deadline = time.monotonic() + 900
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_folder_of_a_run(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *('config.py', 'run.json', 'train.log', 'metrics.jsonl', 'bad_images.txt'),
        *('checkpoints', 'pictures', 'exported', 'last_checkpoint'),
    }
    assert {path.name for path in (finished / 'pictures').iterdir()} == {
        *(f'epoch_{epoch:04d}.png' for epoch in (1, 2, 3, 4)),
        'loss.png',
    }
    assert {path.name for path in (finished / 'exported').iterdir()} == {
        *('mmdet.pth', 'timm.safetensors', 'huggingface', 'detectron2.pth'),
        *('README.md', 'MODEL_CARD.md'),
    }
    metrics = [json.loads(line) for line in (finished / 'metrics.jsonl').open()]
    assert [entry['step'] for entry in metrics] == list(range(1, 13))
    assert all(np.isfinite(entry['loss']) and entry['images_per_second'] > 0 for entry in metrics)
    record = json.loads((finished / 'run.json').read_text())
    assert record['data']['images'] == 12 and record['versions']['torch']
    assert record['settings']['batch_size'] == 4 and record['settings']['steps_per_epoch'] == 3
    assert 'System environment' in (finished / 'train.log').read_text()


def test_exports_are_the_network_of_the_checkpoint(finished):
    source = finished / 'checkpoints/epoch_4.pth'
    for name, target in (
        *(('mmdet.pth', 'mmdet'), ('timm.safetensors', 'timm')),
        *(('huggingface', 'huggingface'), ('detectron2.pth', 'detectron2')),
    ):
        assert verify(source, finished / 'exported' / name, target=target).largest < 1e-4


def test_code_of_the_readme_runs(finished):
    """mmdet, timm and transformers, as printed; of detectron2 there is no package."""
    text = (finished / 'exported/README.md').read_text()
    blocks = [part.partition('\n```')[0] for part in text.split('```python\n')[1:]]
    assert len(blocks) == 4
    # Twice the side: mmdet alone would shift a window that is as large as its map.
    assert 'e.g. of 128 pixels, all four are the same' in text
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    features = []
    for block in blocks[:3]:
        scope: dict = {}
        exec(block.replace('img_size=64', 'img_size=128'), scope)
        model = scope['model']
        model.eval()  # mmdet's returns nothing
        with torch.no_grad():
            found = model.forward_features(images) if 'timm' in block else model(images)
        if 'timm' in block:
            found = found.flatten(1, 2)
        elif 'transformers' in block:
            found = found.last_hidden_state
        else:
            found = found[-1].flatten(2).transpose(1, 2)
        features.append(found)
    for other in features[1:]:
        torch.testing.assert_close(other, features[0], rtol=1e-4, atol=1e-4)
    assert 'detectron2.modeling.SwinTransformer(embed_dim=16' in blocks[3]


def test_config_runs_by_itself(finished, tmp_path):
    train([str(finished / 'config.py'), '--work-dir', str(tmp_path)])
    assert same(weights(tmp_path, 'epoch_4.pth'), weights(finished, 'epoch_4.pth'))


def test_interrupted_killed_and_moved_equals_uninterrupted(finished, photos, tmp_path):
    run = tmp_path / 'run'
    process = start('pretrain', photos, '--out', run, '--epochs', 4, *OPTIONS)
    wait_for(run / 'checkpoints/epoch_1.pth', process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].endswith(f'go on with: greenmim pretrain --out {run} --resume')
    assert 'Traceback' not in err and (run / 'exported/timm.safetensors').exists()

    moved = tmp_path / 'moved'
    run.rename(moved)
    already = {path.name for path in (moved / 'checkpoints').iterdir()}
    if 'epoch_4.pth' not in already:
        process = start('pretrain', '--out', moved, '--resume')
        following = next(n for n in range(2, 5) if f'epoch_{n}.pth' not in already)
        wait_for(moved / f'checkpoints/epoch_{following}.pth', process)
        process.kill()
        process.communicate()
    command('pretrain', photos, '--out', moved, '--resume')
    assert same(weights(moved, 'epoch_4.pth'), weights(finished, 'epoch_4.pth'))
    steps = [json.loads(line)['step'] for line in (moved / 'metrics.jsonl').open()]
    assert steps == list(range(1, 13))
    assert len(json.loads((moved / 'run.json').read_text())['resumed']) >= 1


def test_resume_of_a_finished_run_exports_again(finished, photos, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(finished, run)
    shutil.rmtree(run / 'exported')
    command('pretrain', '--out', run, '--resume', '--export', 'timm')
    assert 'is finished (epoch 4 of 4)' in capsys.readouterr().out
    assert {path.name for path in (run / 'exported').iterdir()} == {
        *('timm.safetensors', 'README.md', 'MODEL_CARD.md')
    }


def test_two_processes(photos, tmp_path):
    run = tmp_path / 'run'
    options = [option if option != '4' else '6' for option in OPTIONS]
    process = start('pretrain', photos, '--out', run, '--epochs', 1, '--devices', 2, *options)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err + out
    assert '3 on each device' in out and out.count('wrote ') == 4
    assert [json.loads(line)['step'] for line in (run / 'metrics.jsonl').open()] == [1, 2]
    assert (run / 'exported/timm.safetensors').exists()


def test_processes_of_torchrun_are_joined(photos, tmp_path):
    """As torchrun starts them: each has the whole command."""
    from greenmim_mm.cli.pretraining.processes import _free_port

    run, port = tmp_path / 'run', str(_free_port())
    options = [option if option != '4' else '6' for option in OPTIONS]
    shared = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port, OMP_NUM_THREADS='1')
    both = [
        start(
            *('pretrain', photos, '--out', run, '--epochs', 1, *options),
            **shared,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in (0, 1)
    ]
    results = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert 'found 12 images' in results[0][0] and results[1][0] == ''
    assert (run / 'exported/timm.safetensors').exists()


def test_init_starts_from_weights(finished, photos, tmp_path, capsys):
    """From an own checkpoint with its decoder: the model's sizes must be a named one's."""
    source = tmp_path / 'tiny.pth'
    model = greenmim_mm.create_model('swin-tiny', window_size=2)
    torch.save(dict(state_dict=model.state_dict()), source)
    run = tmp_path / 'run'
    command(
        *('pretrain', photos, '--out', run, '--epochs', 1, '--image-size', 64, '--workers', 0),
        *('--batch-size', 12, '--lr', '1e-12', '--init', source, '--export', 'mmdet'),
    )
    assert 'that of the checkpoint' in capsys.readouterr().out
    trained = weights(run, 'epoch_1.pth')
    key = 'stages.2.blocks.3.attn.w_msa.qkv.weight'
    torch.testing.assert_close(
        trained[f'backbone.{key}'], model.state_dict()[key], atol=1e-6, rtol=0
    )
    assert 'init.pth' in Config.fromfile(run / 'config.py').model.backbone.init_cfg.checkpoint
    assert 'holds a swin-tiny' in refused(
        capsys, photos, '--out', tmp_path / 'x', '--init', source, '--model', 'swin-base'
    )


def test_bad_images_are_named_and_passed_over(photos, tmp_path, capsys):
    data = tmp_path / 'data'
    shutil.copytree(photos, data)
    (data / 'empty.jpg').touch()
    (data / 'cut.jpg').write_bytes((photos / 'a0.jpg').read_bytes()[:500])
    Image.new('CMYK', (80, 90)).save(data / 'print.jpg')
    run = tmp_path / 'run'
    command('pretrain', data, '--out', run, '--epochs', 1, '--export', 'timm', *OPTIONS)
    assert '2 images could not be used' in capsys.readouterr().out
    named = (run / 'bad_images.txt').read_text().splitlines()
    assert sorted(Path(line.split('\t')[0]).name for line in named) == ['cut.jpg', 'empty.jpg']
    err = refused(capsys, data, '--out', tmp_path / 'y', '--epochs', 1, '--max-bad', 1, *OPTIONS)
    assert '2 of 15 images cannot be used' in err and 'cut.jpg' in err


def test_swin_v2(photos, tmp_path, capsys):
    run = tmp_path / 'run'
    command(*('pretrain', photos, '--out', run, '--model', 'swinv2-tiny', '--epochs', 1, *OPTIONS))
    out = capsys.readouterr().out
    assert 'detectron2: not written' in out and 'greenmim_mm.GreenSwinV2' in out
    assert verify(
        run / 'checkpoints/epoch_1.pth', run / 'exported/huggingface', target='huggingface'
    ).passed


def test_dry_run_does_nothing(photos, tmp_path, capsys):
    command('pretrain', photos, '--out', tmp_path / 'run', '--dry-run')
    out = capsys.readouterr().out
    assert 'found 12 images' in out and '6 images' in out and 'half of the 12' in out
    assert not (tmp_path / 'run').exists()


def test_refusals_about_the_folder(finished, photos, tmp_path, capsys):
    out = ('--out', finished)
    assert 'is not empty (e.g. bad_images.txt)' in refused(capsys, photos, *out)
    assert 'epochs 4 -> 5' in refused(capsys, *out, '--resume', '--epochs', 5)
    assert 'images are others: 12 then, 6 now' in refused(capsys, photos / 'more', *out, '--resume')
    assert 'lies inside the data' in refused(capsys, photos, '--out', photos / 'run')
    assert 'holds no run' in refused(capsys, '--out', tmp_path, '--resume')
    assert 'give one of them' in refused(capsys, *out, photos, '--resume', '--overwrite')
    if os.geteuid():
        (tmp_path / 'locked').mkdir(mode=0o500)
        assert 'Permission denied' in refused(capsys, photos, '--out', tmp_path / 'locked/run')


def test_overwrite_removes_what_runs_write_and_no_more(finished, photos, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(finished, run)
    (run / 'notes.txt').write_text('mine')
    # Nothing is removed for a run that cannot start.
    wrong = ['--cfg-options', 'model.backbone.windw_size=2']
    assert 'did you mean window_size' in refused(
        capsys, photos, '--out', run, '--overwrite', *wrong
    )
    assert (run / 'checkpoints/epoch_4.pth').exists()
    command(
        *('pretrain', photos, '--out', run, '--overwrite', '--epochs', 1, '--export', 'timm'),
        *OPTIONS,
    )
    assert (run / 'notes.txt').read_text() == 'mine'
    assert {path.name for path in (run / 'checkpoints').iterdir()} == {'epoch_1.pth'}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['EMPTY'], 'no images found in EMPTY; looked for .jpg'),
        (['nowhere'], 'nowhere does not exist'),
        (['FILE.pdf'], 'is neither a folder, an image'),
        ([], 'no data: name folders'),
        (['PHOTOS', '--model', 'swin-bas'], 'did you mean swin-base'),
        (['PHOTOS', '--window', '20'], 'windows from 1 to 7 fit'),
        (['PHOTOS', '--batch-size', '100'], 'more than the 12 images'),
        (['PHOTOS', '--devices', '999'], '--devices 999: there'),
        (['PHOTOS', '--precision', 'fp16'], 'needs a GPU'),
        (['PHOTOS', '--init', 'none.pth'], '--init: checkpoint none.pth does not exist'),
        (['PHOTOS', '--init', 'FILE.pdf'], 'is no checkpoint'),
        (['PHOTOS', '--cfg-options', 'train_datloader.x=2'], 'did you mean train_dataloader'),
        (['PHOTOS', '--epochs', '0'], 'is not a positive whole number'),
    ],
)
def test_bad_input_is_one_line(photos, tmp_path, capsys, arguments, message, monkeypatch):
    (tmp_path / 'EMPTY').mkdir()
    (tmp_path / 'FILE.pdf').write_text('x')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    arguments = [str(photos) if argument == 'PHOTOS' else argument for argument in arguments]
    err = refused(capsys, *arguments, '--out', tmp_path / 'run')
    assert message in err.replace(f'{tmp_path}/', '')


def test_full_disk_is_told_before_anything(photos, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
    err = refused(capsys, photos, '--out', tmp_path / 'run', '--epochs', 1, *OPTIONS)
    assert 'GB for checkpoints and exports' in err


def test_python(photos, tmp_path, capsys):
    exported = greenmim_mm.pretrain(
        *(photos, tmp_path / 'run'),
        epochs=1,
        image_size=64,
        batch_size=6,
        workers=0,
        export='timm',
        quiet=True,
        cfg_options=dict(option.split('=') for option in SMALL[1:]),
    )
    assert exported == tmp_path / 'run/exported' and (exported / 'timm.safetensors').exists()
    assert capsys.readouterr().out == ''
    with pytest.raises(TypeError, match="no setting 'windw'"):
        greenmim_mm.pretrain(photos, tmp_path / 'x', windw=7)
    with pytest.raises(ValueError, match='--model swin-x does not exist'):
        greenmim_mm.pretrain(photos, tmp_path / 'x', 'swin-x')
