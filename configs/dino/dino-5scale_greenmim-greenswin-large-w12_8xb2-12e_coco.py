_base_ = 'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py'

# Everything but the backbone is mmdet's.
model = dict(
    backbone=dict(
        _delete_=True,
        type='greenmim_mm.GreenSwin',
        arch='large',
        # Pre-trained with 14 tokens and 7 in the last stage; the tables of biases are resized
        # while loading.
        window_size=12,
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        # As mmdet: maps smaller than a window are padded to it.
        pad_small_map=True,
        with_cp=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/greenmim_swin-large-w14_8xb256-amp-coslr-800e_in1k/epoch_800.pth',
        ),
    )
)
