"""Stands for detectron2, which is not on PyPI: the interface that backbones meet."""
