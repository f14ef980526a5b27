"""What segmentation and detection share: maps at four scales, COCO's annotations, images on a canvas."""
