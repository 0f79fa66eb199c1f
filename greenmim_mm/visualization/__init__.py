"""Pictures: what a pre-trained model paints, and how windows are packed into groups."""

from .packing import draw_packing
from .reconstruction import (
    check_picture_path,
    find_images,
    load_model,
    panel_titles,
    read_image,
    reconstruct_files,
    reconstruction_panels,
    save_reconstructions,
)

__all__ = [
    'check_picture_path',
    'draw_packing',
    'find_images',
    'load_model',
    'panel_titles',
    'read_image',
    'reconstruct_files',
    'reconstruction_panels',
    'save_reconstructions',
]
