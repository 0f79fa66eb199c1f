"""Frozen features of a checkpoint, and their evaluation by nearest neighbours."""

from .creation import create_model
from .features import Features, image_features, usual_image_size
from .frozen import backbone_config, feature_config, feature_extractor, knn_config, own_checkpoint
from .knn import knn_scores
from .loops import KNNTestLoop, KNNValLoop

__all__ = [
    'Features',
    'KNNTestLoop',
    'KNNValLoop',
    'backbone_config',
    'create_model',
    'feature_config',
    'feature_extractor',
    'image_features',
    'knn_config',
    'knn_scores',
    'own_checkpoint',
    'usual_image_size',
]
