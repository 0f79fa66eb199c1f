"""Pictures of what a pre-trained model paints."""

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
    'find_images',
    'load_model',
    'panel_titles',
    'read_image',
    'reconstruct_files',
    'reconstruction_panels',
    'save_reconstructions',
]
