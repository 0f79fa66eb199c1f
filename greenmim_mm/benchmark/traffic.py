"""What a step asks of a device: arithmetic, bytes moved, operators launched. Counted, not timed.

A pre-training step runs forward and backward on fake tensors, which have shapes and no data, so
that a large batch takes neither memory nor time. Every operator that reaches the dispatcher is one
launch. It reads each of its tensors once and writes each result once, whatever caches may save or
a kernel may read twice; views and allocations are free. Roofline times are estimates from these
counts and the data sheet of a device.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from itertools import groupby
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..compat import fakes_gather, flops
from ..ops import attention as group_attention_module
from .candidates import Candidate, missing
from .measure import kept_bytes
from .report import cell, markdown
from .roofline import Device, Launch

# Methods of modules by the name of their class, and the part of the network that they compute.
# Methods and not hooks: a module with a hook is called rather than fused. What the class of a
# backbone computes itself, or a block, which is not listed, is the sum with the residual.
PARTS: dict[str, dict[str, str]] = {
    'GreenMIMStep': {'masked_loss': 'loss'},
    'PeerStep': {'forward': 'loss'},
    'GreenSwin': {'forward': 'residual', '_visible_input': 'embedding', 'plan': 'planning'},
    'GreenSwinV2': {'forward': 'residual', '_visible_input': 'embedding', 'plan': 'planning'},
    'SimMIMSwinTransformer': {'forward': 'residual'},
    'SimMIMSwinTransformerV2': {'forward': 'residual'},
    'MAEViT': {'forward': 'residual', 'random_masking': 'embedding'},
    'PatchEmbed': {'forward': 'embedding', 'forward_patches': 'embedding'},
    'WindowMSA': {'forward': 'attention', 'fused': 'attention'},
    'WindowMSAV2': {'forward': 'attention', 'fused': 'attention'},
    'ShiftWindowMSA': {'forward': 'attention'},
    'MultiheadAttention': {'forward': 'attention'},
    'FFN': {'forward': 'MLP', 'fused': 'MLP'},
    'PatchMerging': {'forward': 'merging'},
    'PatchMergingV2': {'forward': 'merging'},
    'GreenMIMPretrainDecoder': {'forward': 'decoder'},
    'SimMIMLinearDecoder': {'forward': 'decoder'},
    'MAEPretrainDecoder': {'forward': 'decoder'},
}
# A decoder is one part whatever it is made of.
_UNDIVIDED = 'decoder'

# Results that no kernel writes, beside those that the schema says are views.
_FREE = {'_unsafe_view', 'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided'}
# In-place operators that do not look at what they replace.
_OVERWRITING = {
    *('copy_', 'index_copy_', 'fill_', 'zero_'),
    *('normal_', 'uniform_', 'bernoulli_', 'random_'),
}
# Operators that take no more than a shape from their first tensor.
_FILLING = {
    *('zeros_like', 'ones_like', 'full_like', 'rand_like', 'randn_like'),
    *('new_zeros', 'new_ones', 'new_full'),
}
# Operators that read no more of their first tensor than they write.
_GATHERING = {'index_select', 'index', 'gather', 'embedding'}


class Total(NamedTuple):
    """Sums over launches: operations, bytes and their number."""

    flops: int
    moved: int
    launches: int

    @classmethod
    def of(cls, launches: Iterable[Launch]) -> 'Total':
        """Sums over any launches."""
        launches = list(launches)
        return cls(sum(x.flops for x in launches), sum(x.moved for x in launches), len(launches))


class TrafficCounter(TorchDispatchMode):
    """Records every launch inside the block.

    Attributes:
        launches: What was recorded, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._part = ''
        # From which number on nodes of the autograd graph belong to which part.
        self._starts, self._parts = [0], ['']

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and record it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        moved = bytes_moved(func, args, kwargs, out)
        if moved is not None:
            name = func._overloadpacket.__name__
            part = 'norm' if 'layer_norm' in name else self._current_part()
            self.launches.append(Launch(name, part, _flops(func, args, kwargs, out), *moved))
        return out

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Launches of the block, and of its backward pass, belong to ``part``."""
        before = self._part
        self._enter(before if before == _UNDIVIDED else part)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, part: str) -> None:
        self._part = part
        self._starts.append(torch.autograd._get_sequence_nr())
        self._parts.append(part)

    def _current_part(self) -> str:
        node = torch._C._current_autograd_node()
        if self._part or node is None:
            return self._part
        return self._parts[bisect_right(self._starts, node._sequence_nr()) - 1]


def bytes_moved(
    func: torch._ops.OpOverload, args: Sequence, kwargs: dict[str, Any], out: Any
) -> tuple[int, int] | None:
    """Bytes that an operator reads and writes, or None where nothing is launched.

    Args:
        func: The operator.
        args: Its positional arguments.
        kwargs: Its named arguments.
        out: Its result.
    """
    name, schema = func._overloadpacket.__name__, func._schema
    aliases = [result.alias_info for result in schema.returns]
    if name in _FREE or any(alias is not None and not alias.is_write for alias in aliases):
        return None
    read, written = {}, {_place(t): t for t in _tensors(out)}
    for number, argument in enumerate(schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        places = {_place(tensor): tensor for tensor in _tensors(value)}
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= places
            if argument.is_out or name in _OVERWRITING:
                continue
        if number == 0 and (name in _FILLING or kwargs.get('beta', 1) == 0):
            continue  # not looked at: it may hold NaN
        read |= places
    if not written:
        return None
    bytes_read, bytes_written = (sum(map(_num_bytes, x.values())) for x in (read, written))
    if name == 'index_fill_':  # touches no more than what it fills
        dim, index = args[1], args[2]
        return _num_bytes(index), _num_bytes(args[0]) // args[0].shape[dim] * len(index)
    if name in _GATHERING:
        source = _num_bytes(args[0])
        bytes_read += min(source, bytes_written) - source
    return bytes_read, bytes_written


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> tuple:
    """Alike for a tensor and its transpose, which are the same bytes."""
    where = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return *where, *sorted(zip(tensor.shape, tensor.stride(), strict=True))


def _num_bytes(tensor: Tensor) -> int:
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * prod(1 if stride == 0 and n else n for n, stride in sides)


def _flops(func: torch._ops.OpOverload, args: Sequence, kwargs: dict[str, Any], out: Any) -> int:
    kwargs = {name: value for name, value in kwargs.items() if name != 'out'}
    return flops(func._overloadpacket, args, kwargs, out)


@contextmanager
def parts_marked(model: nn.Module, counter: TrafficCounter) -> Iterator[None]:
    """Inside the block, methods of the model's classes tell the counter their part."""

    def marked(method: Callable, part: str) -> Callable:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with counter.within(part):
                return method(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for kind in {type(module) for module in model.modules()}:
            for name, part in PARTS.get(kind.__name__, {}).items():
                if hasattr(kind, name):
                    method = marked(getattr(kind, name), part)
                    stack.enter_context(patch.object(kind, name, method))
        yield


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """Inside the block, attention takes the operators that it takes on CUDA.

    Fake tensors of a device need that device in the backward pass, those of a CPU nothing. For a
    mask that wants a gradient PyTorch takes its memory-efficient kernel on CUDA, and none on a CPU.
    """
    plain = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kw) -> Tensor:
        if attn_mask is None or not attn_mask.requires_grad:
            return plain(q, k, v, attn_mask=attn_mask, **kw)
        keys = attn_mask.shape[-1]
        if any(stride % 8 for stride in attn_mask.stride()[:-1]):  # rows must be aligned
            attn_mask = F.pad(attn_mask, (0, -keys % 8))[..., :keys]
        mask = attn_mask.expand(*q.shape[:3], -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]

    with (
        patch.object(F, 'scaled_dot_product_attention', attention),
        patch.object(group_attention_module, '_best_backend', lambda qkv: 'fused'),
    ):
        yield


@contextmanager
def _fake_step(
    model: nn.Module, images: Sequence[int], amp: bool, kernels: str
) -> Iterator[tuple[Callable[[], Tensor], FakeTensorMode]]:
    """Inside the block, what gives the loss of a batch of fake images, and the mode."""
    # Tables that are kept between steps are made by a first step: one that were made of fake
    # tensors would be of no use to anybody else.
    image = torch.zeros(1, *images[1:])
    with torch.no_grad():
        model(image, model.draw(image))
    chosen = kernels_of_cuda() if kernels == 'cuda' else nullcontext()
    # What depends on the mask's values is planned with numpy: real indices meet fake tokens.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, chosen:
        batch = torch.empty(*images)
        drawn = model.draw(batch)

        def loss() -> Tensor:
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                return model(batch, drawn)

        yield loss, mode


def count_step(
    model: nn.Module, images: Sequence[int], amp: bool = False, kernels: str = 'cuda'
) -> list[Launch]:
    """Launches of a forward and backward pass; nothing is computed.

    Args:
        model: As a :class:`.candidates.Candidate` builds it, on the CPU. Its parameters stay real:
            fused layers want to know them. Gradients that it has are lost.
        images: Shape ``(B, C, H, W)`` of a batch.
        amp: Whether the forward pass runs under bf16 autocast, with the CPU's choice of operators.
        kernels: Attention's operators: those for 'cuda' or for a 'cpu'.
    """
    counter = TrafficCounter()
    with _fake_step(model, images, amp, kernels) as (loss, _):
        model.zero_grad()
        with parts_marked(model, counter), counter:
            loss().backward()
    model.zero_grad()
    return counter.launches


def kept_in_step(
    model: nn.Module, images: Sequence[int], amp: bool = False, kernels: str = 'cuda'
) -> int:
    """Bytes that :func:`count_step`'s forward pass keeps for the backward pass."""
    with _fake_step(model, images, amp, kernels) as (loss, mode):
        return kept_bytes(loss, model, mode.from_tensor)


@dataclass
class Result:
    """What is known of one candidate.

    Attributes:
        name: Name on the command line.
        label: What it is, for the table.
        group: Candidates of one group stand in one table.
        batch: Images of a step.
        operators: Sums by operator.
        parts: Sums by part of the network.
        total: Sum over all.
        kept: Bytes kept for the backward pass of a batch.
        estimates: Seconds of a step in bf16 by device, estimated.
        failure: Why it was not counted.
    """

    name: str
    label: str
    group: str
    batch: int
    operators: dict[str, Total] = field(default_factory=dict)
    parts: dict[str, Total] = field(default_factory=dict)
    total: Total | None = None
    kept: int | None = None
    estimates: dict[str, float] = field(default_factory=dict)
    failure: str = ''


def run(
    candidates: Sequence[Candidate],
    results: list[Result],
    log: Callable[[str], None],
    batch: int,
    devices: Sequence[Device],
    amp: bool = False,
    kernels: str = 'cuda',
) -> None:
    """Count the steps of candidates.

    Args:
        candidates: What to count, groups together.
        results: Gets an entry for each candidate when it is counted.
        log: Takes a line about the progress.
        batch: Images of a step.
        devices: For which times are estimated.
        amp: As of :func:`count_step`.
        kernels: As of :func:`count_step`.

    Raises:
        ValueError: If this torch cannot do it.
    """
    if not fakes_gather():
        raise ValueError(
            f'traffic counts on fake tensors, and those of torch {torch.__version__} do not know '
            'all operators; use torch 2.2 or later'
        )
    for c in candidates:
        result = Result(c.name, c.label, c.group, batch, failure=missing(c.needs))
        if not result.failure:
            log(f'{c.group}: counting {c.name}')
            side = c.img_size
            model, images = c.build(c).train(), (batch, 3, side, side)
            launches = count_step(model, images, amp, kernels)
            result.kept = kept_in_step(model, images, amp, kernels)
            result.total = Total.of(launches)
            result.operators = _sums(launches, lambda launch: launch.operator)
            result.parts = _sums(launches, lambda launch: launch.part or 'other')
            scale = 1 if amp else 0.5
            result.estimates = {d.name: d.seconds(launches, scale) for d in devices}
        results.append(result)


def _sums(launches: Iterable[Launch], key: Callable[[Launch], str]) -> dict[str, Total]:
    """Sums by key, the most bytes first."""
    ordered = sorted(launches, key=key)
    sums = {name: Total.of(members) for name, members in groupby(ordered, key)}
    return dict(sorted(sums.items(), key=lambda item: -item[1].moved))


def tables(results: Sequence[Result], rows: int = 15) -> str:
    """A table of candidates for each group, then for each candidate its parts and operators.

    Args:
        results: What was counted.
        rows: Operators to list; the others are one row.
    """
    sections = []
    for group, members in groupby(results, key=lambda result: result.group):
        members = list(members)
        sections.append(f'### {group}\n\n{markdown([_row(r, members[0]) for r in members])}')
        for result in members:
            if result.total is not None:
                parts = markdown(_breakdown('part', result.parts, result.total))
                operators = _rest_in_one(result.operators, rows)
                operators = markdown(_breakdown('operator', operators, result.total))
                sections += [f'{result.label}, by part and by operator:', parts, operators]
    return '\n\n'.join(sections)


def _row(result: Result, first: Result) -> dict[str, str]:
    total, base = result.total, first.total
    row = {'candidate': result.label, 'batch': str(result.batch)} | _cells(total)
    ratio = total.moved / base.moved if total and base else None
    row['bytes over the first row'] = cell(ratio, '{:.2f}x')
    kept = result.kept and result.kept / result.batch / 1e6
    row['kept for backward, per image'] = cell(kept, '{:.1f} MB')
    # Columns of a group must agree, whichever of its members could be counted.
    for name in first.estimates or result.estimates:
        seconds = result.estimates.get(name)
        row[f'estimate for {name}, bf16'] = cell(seconds and 1000 * seconds, '{:.1f} ms')
    return row | {'note': result.failure}


def _breakdown(column: str, sums: dict[str, Total], whole: Total) -> list[dict[str, str]]:
    return [
        {column: name} | _cells(total) | {'of the bytes': f'{total.moved / whole.moved:.1%}'}
        for name, total in sums.items()
    ]


def _rest_in_one(sums: dict[str, Total], rows: int) -> dict[str, Total]:
    names = list(sums)
    rest = [sums[name] for name in names[rows:]]
    kept = {name: sums[name] for name in names[:rows]}
    if rest:
        kept[f'{len(rest)} others'] = Total(*map(sum, zip(*rest, strict=True)))
    return kept


def _cells(total: Total | None) -> dict[str, str]:
    return {
        'TFLOP': cell(total and total.flops / 1e12, '{:.2f}'),
        'GB moved': cell(total and total.moved / 1e9, '{:.1f}'),
        'launches': cell(total and total.launches, '{:d}'),
    }
