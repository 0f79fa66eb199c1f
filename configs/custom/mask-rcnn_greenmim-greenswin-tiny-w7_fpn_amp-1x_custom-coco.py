# A detector of your own classes, from a data set in COCO's format:
#     DATA_ROOT=path/to/data python tools/train.py CONFIG
# or set data_root here. Classes are read from the annotation file of the training images.
_base_ = '../mask_rcnn/mask-rcnn_greenmim-greenswin-tiny-w7_fpn_amp-1x_coco.py'

from greenmim_mm.datasets import coco_classes  # noqa: E402

data_root = '{{$DATA_ROOT:data/custom}}'

train_ann = 'annotations/instances_train.json'
val_ann = 'annotations/instances_val.json'
classes = coco_classes(f'{data_root}/{train_ann}')

model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))
    )
)

train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=classes),
        ann_file=train_ann,
        data_prefix=dict(img='train/'),
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=classes),
        ann_file=val_ann,
        data_prefix=dict(img='val/'),
    )
)
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=f'{data_root}/{val_ann}')
test_evaluator = val_evaluator
