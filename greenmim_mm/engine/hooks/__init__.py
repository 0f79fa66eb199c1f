"""Hooks of mmengine for runs that nothing is lost of."""

from .checkpoint import CheckpointHook
from .gradient_norm import GradientNormHook
from .interruption import Interruption, InterruptionHook
from .non_finite import NonFiniteLossError, NonFiniteLossHook
from .repeatable import RepeatableRunHook, ResumeError

__all__ = [
    'CheckpointHook',
    'GradientNormHook',
    'Interruption',
    'InterruptionHook',
    'NonFiniteLossError',
    'NonFiniteLossHook',
    'RepeatableRunHook',
    'ResumeError',
]
