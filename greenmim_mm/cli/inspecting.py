"""Says what a checkpoint is."""

from .convert import main_inspect as main

__all__ = ['main']
