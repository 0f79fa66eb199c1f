"""Evaluation of frozen features by their nearest neighbours, which mmpretrain does not have."""

from .frozen import backbone_config, feature_config, feature_extractor, knn_config, own_checkpoint
from .knn import knn_scores
from .loops import KNNTestLoop, KNNValLoop

__all__ = [
    'KNNTestLoop',
    'KNNValLoop',
    'backbone_config',
    'feature_config',
    'feature_extractor',
    'knn_config',
    'knn_scores',
    'own_checkpoint',
]
