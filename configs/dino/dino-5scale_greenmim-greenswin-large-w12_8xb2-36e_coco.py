_base_ = './dino-5scale_greenmim-greenswin-large-w12_8xb2-12e_coco.py'

param_scheduler = [
    dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1)
]

train_cfg = dict(max_epochs=36)
