"""Configs that follow from a checkpoint: no one needs to know which network it holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mmengine.config import Config

from ..checkpoint import convert_file, inspect_checkpoint
from ..checkpoint.architecture import Architecture

if TYPE_CHECKING:
    from mmpretrain.apis import FeatureExtractor

# Formats whose names are GreenSwin's.
_OWN = ('greenmim_mm', 'mmpretrain', 'mmdet')


def feature_config(
    checkpoint: str | Path | None, backbone: dict, img_size: int = 224, resize: int | None = None
) -> Config:
    """Config of a model without head and of how its images are prepared.

    It is what ``mmpretrain.FeatureExtractor`` needs of a config, see :func:`feature_extractor`.

    Args:
        checkpoint: File in the names of the backbone (see :func:`own_checkpoint`); None: the
            weights stay as initialised.
        backbone: Config of the backbone, e.g. from :func:`backbone_config`.
        img_size: Side of the square cut from the middle of each image, in pixels.
        resize: Pixels of the shorter side before; None: 8/7 of ``img_size``, as 256 for 224.
    """
    backbone = dict(backbone, img_size=img_size)
    if checkpoint is not None:
        backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(checkpoint))
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(
            type='ResizeEdge',
            scale=resize or round(img_size * 8 / 7),
            edge='short',
            backend='pillow',
            interpolation='bicubic',
        ),
        dict(type='CenterCrop', crop_size=img_size),
        dict(type='PackInputs'),
    ]
    return Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                data_preprocessor=dict(
                    type='ClsDataPreprocessor',
                    mean=[123.675, 116.28, 103.53],
                    std=[58.395, 57.12, 57.375],
                    to_rgb=True,
                ),
                backbone=backbone,
                neck=dict(type='GlobalAveragePooling'),
            ),
            test_dataloader=dict(dataset=dict(type='CustomDataset', pipeline=pipeline)),
        )
    )


def feature_extractor(
    checkpoint: str | Path,
    window_size: Any = None,
    img_size: int = 224,
    resize: int | None = None,
    device: str | None = None,
) -> 'FeatureExtractor':
    """mmpretrain's ``FeatureExtractor`` with the network of a checkpoint of any format.

    Args:
        checkpoint: See :func:`backbone_config`.
        window_size: Windows to use instead of the checkpoint's.
        img_size: See :func:`feature_config`.
        resize: See :func:`feature_config`.
        device: Where it runs; None: where mmpretrain sees fit.

    Returns:
        The inferencer: ``extractor('image.jpg')[0]`` is a tuple with one ``(C,)`` feature, and
        ``extractor('image.jpg', stage='backbone')[0]`` the ``(C, H, W)`` map before averaging.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: As :func:`backbone_config`.
    """
    from mmpretrain.apis import FeatureExtractor, get_model

    with own_checkpoint(checkpoint) as path:
        backbone = backbone_config(path, window_size)
        model = get_model(feature_config(path, backbone, img_size, resize), device=device)
        # Strictly: mmengine's loader only warns of what does not fit.
        model.backbone.init_weights()
    return FeatureExtractor(model, pretrained=False, device=device)


def knn_config(
    features: Config,
    bank: str | Path,
    images: str | Path,
    work_dir: str | Path,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 64,
    num_workers: int = 2,
) -> Config:
    """Config of a runner whose ``test()`` classifies images by their nearest neighbours.

    Args:
        features: See :func:`feature_config`.
        bank: Folder with a folder of labelled images for each class.
        images: The same for the images to classify.
        work_dir: Folder for logs.
        k: How many neighbours vote.
        temperature: See :func:`~greenmim_mm.evaluation.knn_scores`.
        batch_size: Images of a step.
        num_workers: Processes that load images.
    """

    # Among many images the one that cannot be read is to be named.
    pipeline = [
        dict(type='greenmim_mm.LoadImageFromFile'),
        *features.test_dataloader.dataset.pipeline[1:],
    ]

    def loader(folder: str | Path) -> dict:
        return dict(
            batch_size=batch_size,
            num_workers=num_workers,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
            dataset=dict(
                type='CustomDataset',
                data_root=str(folder),
                pipeline=pipeline,
            ),
        )

    content = features.to_dict()
    content.update(
        test_dataloader=loader(images),
        test_evaluator=dict(type='Accuracy', topk=(1,)),
        test_cfg=dict(
            type='greenmim_mm.KNNTestLoop',
            bank_dataloader=loader(bank),
            k=k,
            temperature=temperature,
        ),
        work_dir=str(work_dir),
        # mmengine tells runs apart by name and second; in one second there may be two.
        experiment_name=Path(work_dir).name,
    )
    return Config(content)


def backbone_config(checkpoint: str | Path, window_size: Any = None) -> dict:
    """Config of the backbone that a checkpoint holds, GreenSwin or GreenSwinV2.

    Args:
        checkpoint: File of any format that :func:`~greenmim_mm.checkpoint.inspect_checkpoint`
            reads.
        window_size: Windows to use instead of the checkpoint's.

    Returns:
        The config, without ``init_cfg``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged or no Swin.
        ValueError: If the windows are told by neither the file nor ``window_size``.
    """
    return _backbone(inspect_checkpoint(checkpoint).architecture, window_size)


def _backbone(found: Architecture, window_size: Any) -> dict:
    windows = window_size or found.window_sizes
    if windows is None:
        raise ValueError(
            'the checkpoint does not tell the windows of its attention; name them (window_size)'
        )
    arch: dict[str, Any] = dict(
        embed_dims=found.embed_dims, depths=found.depths, num_heads=found.num_heads
    )
    config = dict(
        type='greenmim_mm.GreenSwin',
        arch=arch,
        in_channels=found.in_channels,
        window_size=windows,
        mlp_ratio=found.mlp_ratio,
        qkv_bias=found.qkv_bias,
        drop_path_rate=0.0,
    )
    if found.version == 2:
        arch['extra_norm_every_n_blocks'] = found.extra_norm_every
        config['type'] = 'greenmim_mm.GreenSwinV2'
        pretrained = found.pretrained_window_sizes or found.window_sizes
        config['pretrained_window_sizes'] = pretrained or (0, 0, 0, 0)
    return config


@contextmanager
def own_checkpoint(checkpoint: str | Path) -> Iterator[str]:
    """Path of a checkpoint that this package's backbones load: the file, or a passing copy.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged or no Swin.
    """
    if inspect_checkpoint(checkpoint).format in _OWN:
        yield str(checkpoint)
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder) / 'backbone.pth'
        convert_file(checkpoint, copy, 'greenmim_mm', strict=False)
        yield str(copy)
