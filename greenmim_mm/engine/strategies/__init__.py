"""Strategies of mmengine for training that does not fit into one device."""

from .fsdp import FSDPStrategy, wrap_swin_blocks

__all__ = ['FSDPStrategy', 'wrap_swin_blocks']
