"""The small checkpoint that the demo starts from."""

import hashlib
from pathlib import Path

import torch

from .design import Cell, Study, StudyError, version
from .pretrain import weights_path
from .results import ROOT, Places, read_result

DEMO_CHECKPOINT = ROOT / 'configs/demo/greenmim_swin-mini-w4_digits-128px.pth'


def carried_weights(study: Study, method: str, seed: int, length: int) -> Path | None:
    """The repository's checkpoint if it is what that pre-training would give, else None."""
    if not DEMO_CHECKPOINT.exists() or (method, seed) != ('greenmim', study.detect.pretrained_seed):
        return None
    meta = torch.load(DEMO_CHECKPOINT, weights_only=True)['meta']
    found = meta['study'], meta['steps']
    wanted = version(study, Cell('pretrain', method, seed)), study.pretrain.steps[method] * length
    return DEMO_CHECKPOINT if found == wanted else None


def export(study: Study, places: Places, path: Path = DEMO_CHECKPOINT) -> str:
    """Write the weights of the study's longest GreenMIM pre-training in half precision.

    Returns:
        The file's SHA-256.

    Raises:
        StudyError: If that pre-training is not finished, or its weights are not on this machine.
    """
    seed, length = study.detect.pretrained_seed, study.lengths[-1]
    cell = Cell('pretrain', 'greenmim', seed, length=length)
    result = read_result(places, study, cell)
    source = weights_path(study, places, cell)
    if result is None or not source.exists():
        raise StudyError(f'{cell.name} is not finished here; run it first')
    weights = torch.load(source, weights_only=True)['state_dict']
    halves = {
        name: value.half() if value.is_floating_point() else value
        for name, value in weights.items()
    }
    meta = dict(
        study=version(study, cell),
        command='python tools/analysis/evidence.py pretrain --start greenmim '
        f'--seed {seed} --length {length}',
        **{name: result[name] for name in ('steps', 'images', 'minutes', 'held_out')},
    )
    temporary = path.with_suffix('.tmp')
    try:
        torch.save(dict(state_dict=halves, meta=meta), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return hashlib.sha256(path.read_bytes()).hexdigest()
