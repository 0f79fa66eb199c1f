"""What training has that mmengine, mmpretrain and mmdet do not."""
