"""Where the original image lies in a view: boxes that are moved by it land where the labels are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hf_detrkd.data import AugmentationConfig, DetectionTransform, ImageRecord
from hf_detrkd.data.frame import moved


WIDTH, HEIGHT = 90, 60
BOXES = np.array([[5, 5, 20, 30], [40, 10, 30, 40], [60, 30, 29, 29], [1, 40, 10, 15]], dtype=float)
AUGMENTATIONS = {
    "nothing": AugmentationConfig.none(),
    "mirror": AugmentationConfig(horizontal_flip=1.0, scale_jitter=0, iou_crop=0, photometric=1.0),
    "zoom": AugmentationConfig(horizontal_flip=0.5, scale_jitter=1.0, iou_crop=0, photometric=0, min_visible=0.5),
    "crops": AugmentationConfig(iou_crop=1.0, scale_jitter=0.5, min_visible=0.3),
    "DETR's crop": AugmentationConfig(detr_crop=1.0, scale_jitter=0, iou_crop=0),
}


def record() -> ImageRecord:
    count = len(BOXES)
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    crowd = np.zeros(count, dtype=bool)
    return ImageRecord(3, "a", lambda: pixels, BOXES, np.arange(count), BOXES[:, 2:].prod(-1), crowd)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(48, 80), {"shortest_edge": 50, "longest_edge": 100}], ids=str)
def test_moved_boxes_are_the_labels_of_the_view(name: str, size: object) -> None:
    transform = DetectionTransform(size, augmentation=AUGMENTATIONS[name])
    sides = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])
    normal = torch.tensor((BOXES + np.concatenate([BOXES[:, 2:] / 2, 0 * BOXES[:, 2:]], 1)) / sides).float()
    one = record()
    seen = 0
    for seed in range(30):
        item = transform(one.load(), one, seed)
        boxes, visible = moved(normal, item["placed"])
        kept = item["labels"]["class_labels"]
        torch.testing.assert_close(boxes[kept], item["labels"]["boxes"], atol=2e-3, rtol=0)
        left_out = sorted(set(range(len(BOXES))) - set(kept.tolist()))
        if "crop" not in name:  # SSD's crop leaves out boxes by their centre
            assert (visible[kept] >= AUGMENTATIONS[name].min_visible - 0.02).all()
            assert (visible[left_out] <= AUGMENTATIONS[name].min_visible + 0.02).all()
        seen += len(left_out)
    assert (seen == 0) == (name in ("nothing", "mirror"))


def test_a_box_outside_of_the_view_is_not_visible_and_still_a_box() -> None:
    boxes, visible = moved(torch.tensor([[0.1, 0.1, 0.1, 0.1]]), torch.tensor([-1.0, 0.0, 2.0, 1.0]))
    assert visible.item() == 0 and boxes[0, 2:].min() > 0 and (boxes >= 0).all() and (boxes <= 1).all()
