"""The generated data set `shapes`: six classes of drawn objects on textured backgrounds, without a download.

Every image is a function of (seed, split, index) alone and is drawn when it is read. The scene (which objects, where)
is drawn up apart from the pixels, so annotations are known without rendering.
"""

from .records import SHAPES_SIZES, ShapesRecords
from .scenes import SHAPE_CLASSES


__all__ = ["SHAPES_SIZES", "SHAPE_CLASSES", "ShapesRecords"]
