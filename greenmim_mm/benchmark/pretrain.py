"""Pre-training steps of GreenMIM and of its peers, side by side."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .candidates import Candidate, missing
from .measure import (
    Result,
    Settings,
    free_memory,
    is_out_of_memory,
    kept_bytes,
    largest_batch,
    note_out_of_memory,
    record_peak,
    take_turns,
    time_steps,
)


class Trainer:
    """A candidate in training on one batch of random images.

    Args:
        candidate: What to train.
        batch: Images of a step.
        settings: How to measure.
    """

    def __init__(self, candidate: Candidate, batch: int, settings: Settings) -> None:
        self.settings = settings
        self.side = candidate.img_size
        self.model = candidate.build(candidate).to(settings.device).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(trained)
        self.set_batch(batch)

    def set_batch(self, batch: int) -> None:
        """Train on other images."""
        self.images = torch.randn(batch, 3, self.side, self.side, device=self.settings.device)

    def loss(self, drawn: Any) -> Tensor:
        """Loss of the batch."""
        with self.settings.autocast():
            return self.model(self.images, drawn)

    def step(self, drawn: Any) -> None:
        """Forward pass, loss, backward pass and update."""
        try:
            self.loss(drawn).backward()
            self.optimizer.step()
        finally:
            # A step that ran out of memory must not leave its gradients in the way of others.
            self.optimizer.zero_grad()

    def turn(self) -> float:
        """Seconds of one step."""
        steps = self.settings.steps
        drawn = iter([self.model.draw(self.images) for _ in range(steps + 1)])
        return time_steps(lambda: self.step(next(drawn)), steps, self.settings.device)

    def fits(self, batch: int) -> bool:
        """Whether steps on a batch of that size fit into memory."""
        try:
            self.set_batch(batch)
            for _ in range(2):  # the first one makes the optimizer's state, after its peak
                self.step(self.model.draw(self.images))
            return True
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        self.set_batch(1)
        free_memory()
        return False

    def planning_ms(self, repeats: int = 10) -> float | None:
        """Median milliseconds of planning a step, or None where nothing is planned."""
        if not hasattr(self.model, 'plan'):
            return None
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.model.plan(self.images)
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)

    def update_ms(self, repeats: int = 5) -> float:
        """Median milliseconds of the optimizer's update, a part of each step."""
        self.loss(self.model.draw(self.images)).backward()
        times = [time_steps(self.optimizer.step, 1, self.settings.device) for _ in range(repeats)]
        self.optimizer.zero_grad()
        return 1000 * statistics.median(times)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW, fused where PyTorch can: on CUDA, and from version 2.4 on a CPU, too.

    The update takes the same time for every method, and hides what differs between them where it
    is slow.
    """
    try:
        return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=True)
    except RuntimeError:  # before 2.4, on a CPU
        return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05)


def run(
    candidates: Sequence[Candidate],
    results: list[Result],
    log: Callable[[str], None],
    settings: Settings,
    batch: int | None = None,
    find_batch: bool = False,
) -> None:
    """Measure candidates, group by group.

    Args:
        candidates: What to measure, groups together.
        results: Gets one entry for each candidate at once, which is filled as time passes: an
            interrupt loses nothing.
        log: Takes a line about the progress.
        settings: How to measure.
        batch: Images of a step; each candidate's own if None.
        find_batch: Whether to look for the largest batch that fits on the device.
    """
    scale = 32 if settings.device.type == 'cuda' else 1
    for c in candidates:
        results.append(
            Result(c.name, c.label, c.group, batch or c.batch * scale, failure=missing(c.needs))
        )
    pairs = zip(candidates, results, strict=True)
    for _, group in groupby(pairs, key=lambda pair: pair[1].group):
        members = [pair for pair in group if not pair[1].failure]
        if find_batch:
            _find_batches(members, log, settings)
        _run_group(members, log, settings)
        free_memory()


def _find_batches(
    members: Sequence[tuple[Candidate, Result]], log: Callable[[str], None], settings: Settings
) -> None:
    """Find the largest batch of each candidate while it is alone on the device."""
    for candidate, result in members:
        log(f'{result.group}: {result.name}: looking for the largest batch')
        with note_out_of_memory(result):
            result.largest_batch = largest_batch(Trainer(candidate, 1, settings).fits)
        free_memory()


def _run_group(
    members: Sequence[tuple[Candidate, Result]], log: Callable[[str], None], settings: Settings
) -> None:
    turns = []
    for candidate, result in members:
        log(f'{result.group}: {result.name}: building and warming up')
        with note_out_of_memory(result):
            turns.append((result, _prepare(candidate, result, settings).turn))
    take_turns(turns, settings.repeats, log)


def _prepare(candidate: Candidate, result: Result, settings: Settings) -> Trainer:
    """Build and warm up a candidate, and measure what needs no turns."""
    with record_peak(result, settings.device):
        trainer = Trainer(candidate, result.batch, settings)
        for _ in range(settings.warmup):
            trainer.step(trainer.model.draw(trainer.images))
    drawn = trainer.model.draw(trainer.images)
    result.kept_bytes = kept_bytes(partial(trainer.loss, drawn), trainer.model)
    result.planning_ms = trainer.planning_ms()
    result.update_ms = trainer.update_ms()
    return trainer
