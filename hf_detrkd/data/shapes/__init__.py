"""The generated data set `shapes`: six classes of drawn objects on textured backgrounds, without a download.

Every image depends only on (seed, split, index) and is rendered on access. The scene (the objects and their places)
is generated separately from the pixels, so annotations are known without rendering.
"""

from .records import SHAPES_SIZES, ShapesRecords
from .scenes import SHAPE_CLASSES


__all__ = ["SHAPES_SIZES", "SHAPE_CLASSES", "ShapesRecords"]
