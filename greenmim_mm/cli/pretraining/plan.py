"""What a pre-training does: what the user asked for, and a choice with a reason for the rest.

Pure data and functions of it; nothing here reads files or needs torch.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...archs import SWIN_ARCHS, SWINV2_ARCHS
from ..errors import UserError

MODELS: dict[str, tuple[int, str]] = {
    **{f'swin-{size}': (1, size) for size in SWIN_ARCHS},
    **{f'swinv2-{size}': (2, size) for size in SWINV2_ARCHS},
}
"""Version of Swin and name of the architecture, by the name of the model."""

EXPORTS = ('mmdet', 'timm', 'huggingface', 'detectron2')
PRECISIONS = ('auto', 'fp32', 'bf16', 'fp16')
UNIT = 32  # pixels of a mask unit, and of a token of the last map
_IMAGE_SIZE = {1: 224, 2: 256}
_WINDOW = {1: 7, 2: 8}
_SMALL = ('tiny', 'small')
_SEEN = 12_800_000
_LEAST_EPOCHS, _MOST_EPOCHS, _MOST_WARMUP = 100, 1600, 40
_MOST_WORKERS = 8
_CPU_BATCH = 32


@dataclass(frozen=True)
class Request:
    """What the user asks for. None and 'auto': to be chosen.

    Attributes:
        data: Folders, image files and lists of images.
        out: Folder of the run.
        model: Name of the network, a key of :data:`MODELS`.
        window: Side of the attention windows in tokens.
        image_size: Side of the crops in pixels.
        init: Checkpoint of any known format to start from.
        epochs: Passes over the images.
        batch_size: Images of a step, over all devices.
        accumulate: Parts in which a device computes its share of a step, to save memory.
        lr: Learning rate of the step's batch.
        devices: Processes, one for each GPU, or on the CPU.
        precision: One of :data:`PRECISIONS`.
        workers: Processes that load images, for each device.
        seed: Seed of all random numbers.
        max_bad: Images that may be unreadable: a number, or a share as '1%'.
        export: Formats of the results, of :data:`EXPORTS`.
        tensorboard: Write curves for TensorBoard, too.
        compile: Let torch compile the step.
        cfg_options: ``KEY=VALUE`` settings of the config.
    """

    data: tuple[str, ...]
    out: str
    model: str | None = None
    window: int | None = None
    image_size: int | None = None
    init: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    lr: float | None = None
    devices: int | None = None
    precision: str = 'auto'
    workers: int | None = None
    seed: int = 0
    max_bad: str = '1%'
    export: tuple[str, ...] = EXPORTS
    tensorboard: bool = False
    compile: bool = False
    cfg_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What there is to compute with.

    Attributes:
        gpus: How many GPUs torch sees.
        bf16: Whether they compute in bfloat16.
        cores: CPU cores that this process may use.
        gpu: Name of the first GPU.
    """

    gpus: int
    bf16: bool
    cores: int
    gpu: str = ''


@dataclass(frozen=True)
class Start:
    """What a checkpoint to start from holds.

    Attributes:
        model: Name of its network, a key of :data:`MODELS`; None for other sizes.
        windows: Its windows, one a stage; None if it does not tell.
    """

    model: str | None
    windows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """All settings of a run.

    Attributes are those of :class:`Request`, chosen where they were not given, and

    Attributes:
        windows: Windows of the four stages.
        num_images: Images in the data.
        steps_per_epoch: Updates of the parameters in an epoch.
        warmup_steps: Updates with a rising learning rate.
        on_gpu: Whether it runs on GPUs.
        reasons: Why a setting is as it is, by its name.
    """

    data: tuple[str, ...]
    model: str
    windows: tuple[int, ...]
    image_size: int
    init: str | None
    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    devices: int
    precision: str
    workers: int
    seed: int
    max_bad: float
    export: tuple[str, ...]
    tensorboard: bool
    compile: bool
    cfg_options: tuple[str, ...]
    num_images: int
    steps_per_epoch: int
    warmup_steps: int
    on_gpu: bool
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Version of Swin."""
        return MODELS[self.model][0]

    @property
    def arch(self) -> dict[str, Any]:
        """Sizes of the network."""
        archs = SWIN_ARCHS if self.version == 1 else SWINV2_ARCHS
        return archs[MODELS[self.model][1]]

    @property
    def device_batch(self) -> int:
        """Images of a step on one device."""
        return self.batch_size // self.devices

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'Plan':
        """The inverse of :meth:`to_dict`, of what JSON makes of it."""
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})

    def describe(self) -> list[str]:
        """A line for each setting, with its reason."""
        windows = set(self.windows)
        window = str(windows.pop()) if len(windows) == 1 else ', '.join(map(str, self.windows))
        share = '' if self.devices == 1 else f', {self.device_batch} on each device'
        parts = '' if self.accumulate == 1 else f', in {self.accumulate} parts'
        warmup = f', {self.warmup_steps} steps of warm-up' if self.warmup_steps else ''
        values = {
            'model': self.model,
            'image_size': f'{self.image_size} pixels',
            'window': f'{window} tokens',
            'devices': f'{self.devices} {"GPU" if self.on_gpu else "CPU process"}'
            + ('' if self.devices == 1 else 's' if self.on_gpu else 'es'),
            'batch_size': f'{self.batch_size} images{share}{parts}',
            'lr': f'{self.lr:.3g}',
            'epochs': f'{self.epochs}, of {self.steps_per_epoch} steps each{warmup}',
            'precision': self.precision,
            'workers': f'{self.workers} a device',
        }
        if self.init:
            values['init'] = self.init
        labels = {name: name.replace('_', ' ') for name in values}
        width = max(map(len, labels.values()))
        return [
            f'  {labels[name]:{width}}  {value}  ({self.reasons.get(name, "as you said")})'
            for name, value in values.items()
        ]


def find_model(name: str) -> str:
    """A model's name, checked.

    Raises:
        UserError: If there is none; the message names the nearest.
    """
    found = name.lower().replace('_', '-')
    if found not in MODELS:
        near = difflib.get_close_matches(found, MODELS, 1)
        hint = f'did you mean {near[0]}? There are ' if near else 'there are '
        raise UserError(f'--model {name} does not exist; {hint}{", ".join(MODELS)}')
    return found


def model_defaults(name: str) -> tuple[int, int, int]:
    """Image size in pixels, window in tokens and images of a step on a GPU, unless others say."""
    version, size = MODELS[name]
    return _IMAGE_SIZE[version], _WINDOW[version], 128 if size in _SMALL else 64


def bad_limit(text: str) -> float:
    """How many images may be bad: a share below 1, or a number.

    Raises:
        UserError: If ``text`` is neither ``5``, ``0.01`` nor ``1%``.
    """
    number, percent = str(text).strip(), False
    if number.endswith('%'):
        number, percent = number[:-1], True
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf or (percent and value > 1):
        raise UserError(f'--max-bad {text}: give a share such as 1%, or a number of images')
    # All of them: as many as no data set has.
    return 1e12 if percent and value == 1 else value


def check_image_size(size: int) -> None:
    """Raise :class:`UserError` unless mask units tile an image and some of them can be hidden."""
    if size < 2 * UNIT or size % UNIT:
        below = max(size // UNIT, 2) * UNIT
        raise UserError(
            f'--image-size {size} must be a multiple of {UNIT} pixels, the side of a mask unit, '
            f'and at least {2 * UNIT}; the nearest are {below} and {below + UNIT}'
        )


def choose_windows(
    version: int, image_size: int, window: int | None, start: Start | None
) -> tuple[tuple[int, ...], str | None]:
    """Windows of the stages, and why; no reason for what the user said.

    The last map may be smaller than the window of the others, which its stage then takes, as
    Swin does itself.

    Raises:
        UserError: If a window is larger than the third map.
    """
    last = image_size // UNIT
    maps = [8 * last, 4 * last, 2 * last, last]
    if window is None and start and start.windows:
        if all(w <= size for w, size in zip(start.windows, maps, strict=True)):
            return start.windows, 'that of the checkpoint'
    if window is None:
        usual = _WINDOW[version]
        chosen = min(usual, last)
        why = f"Swin{' V2' * (version == 2)}'s own"
        if chosen < usual:
            why = f'the last map of an image of {image_size} pixels has {last} x {last} tokens'
        return (chosen,) * 4, why
    if not 1 <= window <= maps[2]:
        raise UserError(
            f'--window {window} does not fit images of {image_size} pixels, whose maps have sides '
            f'of {", ".join(map(str, maps))} tokens: windows from 1 to {last} fit all of them, '
            f'and up to {maps[2]} all but the last'
        )
    return tuple(min(window, size) for size in maps), None


def make_plan(
    request: Request, num_images: int, machine: Machine, start: Start | None = None
) -> Plan:
    """Choose what was not asked for.

    Args:
        request: What was.
        num_images: Images in the data.
        machine: Where it runs.
        start: What the checkpoint of ``request.init`` holds.

    Raises:
        UserError: If settings do not go together, or with the data or the machine.
    """
    reasons: dict[str, str] = {}

    def choose(name: str, asked: Any, chosen: Any, why: str) -> Any:
        if asked is not None:
            return asked
        reasons[name] = why
        return chosen

    _check_numbers(request)
    if num_images < 2:
        raise UserError(f'{num_images} image found in {", ".join(request.data)}; give at least 2')
    model = _choose_model(request, start, reasons)
    version, size = MODELS[model]
    image_size = choose(
        'image_size', request.image_size, _IMAGE_SIZE[version], f'usual for {model}'
    )
    check_image_size(image_size)
    windows, why = choose_windows(version, image_size, request.window, start)
    if why:
        reasons['window'] = why

    on_gpu = machine.gpus > 0
    devices = _choose_devices(request, machine, reasons)
    batch = _choose_batch(request, size, num_images, devices, on_gpu, reasons)
    per_256 = 1.5e-4 if size in (*_SMALL, 'base') else 1e-4
    lr = choose('lr', request.lr, per_256 * batch / 256, f'{per_256:g} for each 256 images')
    steps = num_images // batch
    wanted = math.ceil(_SEEN / num_images)
    epochs = min(max(wanted, _LEAST_EPOCHS), _MOST_EPOCHS)
    why = f'{_SEEN / 1e6:g} million images are seen'
    if epochs != wanted:
        why = f'{"at least" if epochs > wanted else "at most"} {epochs}'
    epochs = choose('epochs', request.epochs, epochs, why)
    warmup = round(min(epochs / 10, _MOST_WARMUP) * steps)
    cores = max(machine.cores // devices, 1)
    why = f'{machine.cores} CPU cores' if cores < _MOST_WORKERS else f'at most {_MOST_WORKERS}'
    return Plan(
        data=request.data,
        model=model,
        windows=windows,
        image_size=image_size,
        init=request.init,
        epochs=epochs,
        batch_size=batch,
        accumulate=request.accumulate or 1,
        lr=lr,
        devices=devices,
        precision=_choose_precision(request.precision, machine, reasons),
        workers=choose('workers', request.workers, min(cores, _MOST_WORKERS), why),
        seed=request.seed,
        max_bad=bad_limit(request.max_bad),
        export=_check_exports(request.export),
        tensorboard=request.tensorboard,
        compile=request.compile,
        cfg_options=request.cfg_options,
        num_images=num_images,
        steps_per_epoch=steps,
        # A ramp of one step is none.
        warmup_steps=warmup if warmup > 1 else 0,
        on_gpu=on_gpu,
        reasons=reasons,
    )


def _check_numbers(request: Request) -> None:
    for name in ('window', 'epochs', 'batch_size', 'accumulate', 'devices'):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f'--{name.replace("_", "-")} {value} must be at least 1')
    if request.workers is not None and request.workers < 0:
        raise UserError(f'--workers {request.workers} must not be negative')
    if request.lr is not None and not 0 < request.lr < math.inf:
        raise UserError(f'--lr {request.lr:g} must be positive')
    if request.seed < 0:
        raise UserError(f'--seed {request.seed} must not be negative')


def _choose_model(request: Request, start: Start | None, reasons: dict[str, str]) -> str:
    model = find_model(request.model) if request.model else None
    if start is None:
        if model is None:
            model, reasons['model'] = 'swin-tiny', 'the smallest; --model names another'
        return model
    if start.model is None:
        raise UserError(
            f'--init {request.init} holds a network of its own size, none of {", ".join(MODELS)}'
        )
    if model is None:
        reasons['model'] = 'that of the checkpoint'
    elif model != start.model:
        raise UserError(
            f'--init {request.init} holds a {start.model}, which does not fit --model {model}; '
            f'give --model {start.model}, or weights of {model}'
        )
    return start.model


def _choose_devices(request: Request, machine: Machine, reasons: dict[str, str]) -> int:
    there, what = machine.gpus, 'GPU'
    if not machine.gpus:
        there, what = machine.cores, 'CPU core'
    if request.devices is None:
        reasons['devices'] = f'all of {machine.gpu}' if machine.gpus else 'there is no GPU'
        return max(machine.gpus, 1)
    if request.devices > there:
        raise UserError(
            f'--devices {request.devices}: there {"is" if there == 1 else "are"} {there} {what}'
            f'{"" if there == 1 else "s"} here; give {there} or fewer'
        )
    return request.devices


def _choose_batch(
    request: Request,
    size: str,
    num_images: int,
    devices: int,
    on_gpu: bool,
    reasons: dict[str, str],
) -> int:
    parts = request.accumulate or 1
    unit = devices * parts
    batch = request.batch_size
    if batch is None:
        each = (128 if size in _SMALL else 64) if on_gpu else _CPU_BATCH
        reasons['batch_size'] = f'{each} a device {f"for {size}" if on_gpu else "on a CPU"}'
        batch = each * devices
        if batch > num_images // 2:
            batch = num_images // 2
            reasons['batch_size'] = f'half of the {num_images} images'
        batch -= batch % unit
        if batch == 0:
            raise UserError(
                f'{num_images} images are too few for {devices} devices and --accumulate {parts}: '
                f'half of them give no batch; use fewer, or --batch-size {unit}'
            )
        return batch
    if batch > num_images:
        raise UserError(
            f'--batch-size {batch} is more than the {num_images} images; give {num_images} or less'
        )
    if batch % unit:
        nearest = max(batch // unit, 1) * unit
        raise UserError(
            f'--batch-size {batch} is no multiple of {devices} devices x --accumulate {parts}; '
            f'the nearest are {nearest} and {nearest + unit}'
        )
    return batch


def _choose_precision(asked: str, machine: Machine, reasons: dict[str, str]) -> str:
    if asked not in PRECISIONS:
        raise UserError(f'--precision {asked} is none of {", ".join(PRECISIONS)}')
    if asked == 'auto':
        reasons['precision'] = 'on a CPU'
        if machine.gpus:
            reasons['precision'] = f'{machine.gpu} has {"" if machine.bf16 else "no "}bf16'
            return 'bf16' if machine.bf16 else 'fp16'
        return 'fp32'
    if asked != 'fp32' and not machine.gpus:
        raise UserError(f'--precision {asked} needs a GPU and there is none; use fp32')
    if asked == 'bf16' and not machine.bf16:
        raise UserError(f'--precision bf16: {machine.gpu} has no bf16; use fp16')
    return asked


def _check_exports(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in EXPORTS:
            raise UserError(f'--export {name} is none of {", ".join(EXPORTS)}')
    return tuple(dict.fromkeys(names))
