"""Measuring: steps in turn, bytes kept for the backward pass, memory that does not suffice."""

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Spread(NamedTuple):
    """Median, least and greatest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        """Spread of at least one number."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Result:
    """What is known of one candidate; fields are filled while it is measured.

    Attributes:
        name: Name on the command line.
        label: What it is, for the table.
        group: Candidates of one group run in turn; the first is the one that others are held to.
        batch: Images of a step.
        seconds: Seconds of one step, an entry for each round.
        kept_bytes: Bytes kept for the backward pass of a batch.
        planning_ms: Milliseconds of planning in a step.
        update_ms: Milliseconds of the optimizer's update in a step.
        peak_bytes: On CUDA, memory at its peak: parameters, optimizer and activations.
        largest_batch: On CUDA, the largest batch that fits alone on the device.
        failure: Why it was not measured, or not to the end.
        note: What else is to be said.
    """

    name: str
    label: str
    group: str
    batch: int
    seconds: list[float] = field(default_factory=list)
    kept_bytes: int | None = None
    planning_ms: float | None = None
    update_ms: float | None = None
    peak_bytes: int | None = None
    largest_batch: int | None = None
    failure: str = ''
    note: str = ''

    @property
    def rate(self) -> Spread | None:
        """Images per second, or None where no step was timed."""
        return Spread.of([self.batch / s for s in self.seconds]) if self.seconds else None

    @property
    def kept_per_image(self) -> float | None:
        """Bytes kept for the backward pass of one image."""
        return None if self.kept_bytes is None else self.kept_bytes / self.batch


def speedup(result: Result, over: Result) -> float | None:
    """How many times the median images/s of ``over`` the median of ``result`` is."""
    return result.rate.median / over.rate.median if result.rate and over.rate else None


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: Where models run.
        repeats: Rounds of turns.
        warmup: Steps before the first turn.
        steps: Consecutive steps of a turn.
        amp: Whether forward passes run under bf16 autocast.
    """

    device: torch.device
    repeats: int = 5
    warmup: int = 2
    steps: int = 1
    amp: bool = False

    def autocast(self) -> torch.autocast:
        """Context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


def time_steps(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Seconds of one of ``count`` consecutive steps.

    On CUDA the allocator's blocks still have the sizes of the candidate that ran before. They are
    given back and one more step, not timed, fills the cache again.
    """
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        step()
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


def take_turns(
    turns: Sequence[tuple[Result, Callable[[], float]]],
    repeats: int,
    log: Callable[[str], None],
) -> None:
    """Time candidates in turn, so that whatever else the machine does meets all of them alike.

    Args:
        turns: For each candidate its result, to which times are added, and what times it: a
            function that returns the seconds of one step. One that runs out of memory is noted
            and left out of later rounds.
        repeats: Number of rounds.
        log: Takes a line about the progress.
    """
    for number in range(repeats):
        for result, turn in turns:
            if result.failure:
                continue
            with note_out_of_memory(result):
                result.seconds.append(turn())
                log(
                    f'{result.group}: round {number + 1} of {repeats}: {result.name} '
                    f'{1000 * result.seconds[-1]:.1f} ms a step'
                )


@contextmanager
def record_peak(result: Result, device: torch.device) -> Iterator[None]:
    """On CUDA, note how far memory rises inside the block.

    Candidates that wait for their turn hold memory as well; it is not this one's.
    """
    if device.type != 'cuda':
        yield
        return
    free_memory()
    others = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield
    result.peak_bytes = torch.cuda.max_memory_allocated(device) - others


def kept_bytes(
    forward: Callable[[], Tensor | Sequence[Tensor]],
    model: nn.Module,
    seen_as: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward()``.

    Every distinct storage among the saved tensors counts once and whole, as a saved view keeps
    all of it alive. What custom functions hold as attributes counts as well, although autograd's
    hooks do not see it. Parameters and buffers of ``model`` do not count; copies of parameters,
    as autocast makes them, do.

    Args:
        forward: The forward pass; returns the loss, or all that a backward pass starts from.
        model: Owner of the parameters.
        seen_as: What a parameter may be inside of ``forward`` beside itself.
    """
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no later storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    for tensor in _held_tensors([out] if isinstance(out, Tensor) else out):
        pack(tensor)
    for tensor in (*model.parameters(), *model.buffers()):
        for own in (tensor, seen_as(tensor)):
            kept.pop(own.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def _held_tensors(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Tensors among the attributes of the custom functions of a graph, one dataclass deep."""
    nodes, seen = [output.grad_fn for output in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        for value in getattr(node, '__dict__', {}).values():
            held = vars(value).values() if is_dataclass(value) else [value]
            yield from (tensor for tensor in held if isinstance(tensor, Tensor))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on the CPU or on CUDA."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    # PyTorch's CPU allocator and oneDNN have no class of their own for it.
    phrases = ("can't allocate memory", 'not enough memory', 'could not create a memory object')
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


@contextmanager
def note_out_of_memory(result: Result) -> Iterator[None]:
    """Turn memory that does not suffice inside the block into a failure of the result."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        result.failure = f'out of memory at batch {result.batch}'
    if result.failure:
        free_memory()


def free_memory() -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_batch(fits: Callable[[int], bool], limit: int = 1 << 16) -> int:
    """The largest batch that fits, to an eighth: doubled until it does not, then bisected.

    Args:
        fits: Whether a batch fits.
        limit: Where to stop.

    Returns:
        The batch; 0 if not even one image fits.
    """
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while high <= limit and high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def available_memory() -> int | None:
    """Bytes that this process may still take on the CPU, or None where it cannot be told."""
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith('MemAvailable'))
    except (OSError, StopIteration):
        return None
    with suppress(OSError, ValueError):  # no such file, or the word 'max'
        free = min(free, int(Path('/sys/fs/cgroup/memory.max').read_text()))
    return free


@contextmanager
def memory_limit(extra: int | None) -> Iterator[None]:
    """Let allocations fail that would take more than ``extra`` bytes from here on.

    Linux grants more memory than there is and later kills who uses it, which no program can
    catch. A limit on the process's data makes the allocation itself fail.

    Args:
        extra: Bytes; None sets no limit, and neither do systems without ``/proc``.
    """
    if extra is None or not sys.platform.startswith('linux'):
        yield
        return
    status = Path('/proc/self/status').read_text().splitlines()
    used = next(int(line.split()[1]) << 10 for line in status if line.startswith('VmData'))
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + extra if hard == resource.RLIM_INFINITY else min(used + extra, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))
