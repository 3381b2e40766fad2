"""Images with boxes from a stream of rows, each checked when it is read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import fsspec

from .augmentation import item_seed
from .detection import DetectionDataset
from .errors import DatasetError, UnreadableImageError
from .images import read_image
from .layouts.rows import Classes, category_of, load_rows, named_classes, record_of
from .records import RepairedBoxes
from .stream import Item, RowStream
from .transforms import DetectionTransform


HEAD = 100  # rows that are checked before a run
BUFFER = 1000
_COLUMNS = ("image", "objects", "image_id", "width", "height", "__key__")


class DetectionStream(RowStream):
    """Images with boxes from a stream of the `datasets` library, in endless passes, for training.

    Each row is checked when it is read: boxes without area are dropped, boxes that extend beyond their image are
    clipped, and both are counted; annotations that cannot be repaired are an error.

    Args:
        rows (`datasets.IterableDataset`): in the schema of `layouts/rows.py`, or of WebDataset: an image, and `json`
            with `objects`, or with `bbox` and `category`. It must not be shuffled.
        name (`str`, *optional*, defaults to `"the stream"`): in messages.
        class_names (`Sequence[str]`, *optional*): needed if `category` is no `ClassLabel`: the names that occur, or
            those of the numbers 0, 1, ...
        skip_unreadable_images (`bool`, *optional*, defaults to `False`): skip and count them instead of raising.
        shuffle_buffer_size (`int`, *optional*, defaults to 1000): rows of each reader among which the next one is
            drawn.
        max_samples (`int`, *optional*): rows of a pass, from the first one.

    Attributes:
        classes (`list[str]`), category_ids (`list[int]`): as in [`DetectionDataset`].
        transform ([`DetectionTransform`], *optional*): set by [`~DetectionStream.with_transform`].

    Raises:
        `DatasetError`: the columns do not match the schema, or the class names are not known.

    Example:
        ```python
        >>> rows = datasets.load_dataset("path/to/folder", split="train", streaming=True)
        >>> stream = DetectionStream(rows).with_transform(DetectionTransform((640, 640)), seed=42)
        ```
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        name: str = "the stream",
        class_names: Sequence[str] | None = None,
        skip_unreadable_images: bool = False,
        shuffle_buffer_size: int = BUFFER,
        max_samples: int | None = None,
    ) -> None:
        for argument, value in (("shuffle_buffer_size", shuffle_buffer_size), ("max_samples", max_samples or 1)):
            if value < 1:
                raise DatasetError(f"`{argument}` of {name} must be at least 1, got {value}.")
        super().__init__(as_rows(rows, name), name)
        self.named = stream_classes(self.rows.features, name, class_names)
        self.classes, self.category_ids = self.named.names, list(range(len(self.named.names)))
        kept = [column for column in _COLUMNS if column in self.rows.features]
        self.rows = self.rows.select_columns(kept).cast_column("image", datasets.Image(decode=False))
        self.skip_unreadable_images = skip_unreadable_images
        self.shuffle_buffer_size, self.most = shuffle_buffer_size, max_samples
        self.num_rows = known_rows(rows, max_samples)
        self.transform: DetectionTransform | None = None

    def with_transform(
        self, transform: DetectionTransform, seed: int = 0, views: int | None = None
    ) -> DetectionStream:
        """A copy with the given transform; `seed` is that of the augmentation and of the shuffle.

        Raises:
            `ValueError`: with `views`, since the images of a stream do not come back in turn.
        """
        if views is not None:
            raise ValueError("A stream has no augmentation views: leave out augmentation_views, or do not stream.")
        stream = copy.copy(self)
        stream.transform, stream.seed = transform, seed
        return stream

    def batches_of(self, rows: datasets.IterableDataset) -> Iterator[dict[str, list[Any]]]:
        """As in [`RowStream`].

        Raises:
            `DatasetError`: a row is not of the types of the columns, which WebDataset takes from its first rows.
        """
        try:
            yield from super().batches_of(rows)
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise DatasetError(f"A row of {self.name} is not of the types of its columns: {error}.") from error

    def read(self, row: Mapping[str, Any], number: int, epoch: int) -> tuple[Item | None, RepairedBoxes | None]:
        """The tensors of a row, see [`DetectionTransform`]; they depend only on the row and (seed, epoch, number).

        Raises:
            `ValueError`: before `with_transform`.
            `UnreadableImageError`: the image cannot be decoded, and is not skipped.
            `DatasetError`: annotations that cannot be repaired, or another image size than annotated.
        """
        if self.transform is None:
            raise ValueError("The stream has no transform: call `with_transform(DetectionTransform(...))` first.")
        name = self._name(row, number)
        try:
            image = read_image(content_of(row["image"], name), name)
        except UnreadableImageError:
            if self.skip_unreadable_images:
                return None, None
            raise
        given = row.get("image_id")
        record, found = record_of(row, image, given if type(given) is int else number, name, self.named)
        return self.transform(record.load(), record, item_seed(self.seed, epoch, number)), found

    def head(self, count: int = HEAD) -> DetectionDataset:
        """The first images as a data set, for checks before a run.

        Raises:
            `DatasetError`: for all that is wrong with them.
        """
        rows = list(self._whole(self.rows.take(count)))
        if not rows:
            raise DatasetError(f"None of the first {count} rows of {self.name} has an image that can be read.")
        found = datasets.Dataset.from_list(rows, features=self.rows.features)
        return load_rows(found, f"{self.name}, the first {len(rows)} rows", self.named)

    def _whole(self, rows: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
        """Rows with the bytes of their images; without those that cannot be read, if they are skipped."""
        for number, row in enumerate(rows):
            name = self._name(row, number)
            try:
                content = content_of(row["image"], name)
                if self.skip_unreadable_images:
                    read_image(content, name)
            except UnreadableImageError:
                if self.skip_unreadable_images:
                    continue
                raise
            yield row | {"image": {"bytes": content, "path": row["image"]["path"]}}

    def _name(self, row: Mapping[str, Any], number: int) -> str:
        path = (row["image"] or {}).get("path")
        return f"{self.name}, {row.get('__key__') or path or row.get('image_id') or f'row {number}'}"


def stream_classes(features: datasets.Features, name: str, given: Sequence[str] | None) -> Classes:
    """The classes of a stream, whose rows are not known yet.

    Raises:
        `DatasetError`: they are not known, or not those given.
    """
    field, category = category_of(features, name)
    if isinstance(category, datasets.ClassLabel):
        if given is not None and list(given) != category.names:
            raise DatasetError(f"{name} names its classes {category.names[:10]}: leave out --class_names.")
        return named_classes(field, category.names)
    if not given:
        raise DatasetError(
            f"The classes of {name} are not known before its end, since `{field}` is {category} and no `ClassLabel`: "
            "name them with --class_names (`class_names`)."
        )
    if len(set(given)) < len(given):
        raise DatasetError(f"--class_names must be different names, got {list(given)[:10]}.")
    if "int" in category.dtype:
        return named_classes(field, given)
    return Classes(field, list(given), {one: number for number, one in enumerate(given)})


def as_rows(rows: datasets.IterableDataset, name: str) -> datasets.IterableDataset:
    """A stream in the schema of rows, also if it has that of WebDataset.

    Raises:
        `DatasetError`: it is no stream, or its columns are not known.
    """
    if not isinstance(rows, datasets.IterableDataset) or rows.features is None:
        what = "one without known columns" if isinstance(rows, datasets.IterableDataset) else type(rows).__name__
        raise DatasetError(
            f"{name} must be a `datasets.IterableDataset` with features, got {what}: load it with `streaming=True`, "
            "or give its features to `cast` or `map`."
        )
    features, inner = rows.features, rows.features.get("json")
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if not isinstance(inner, dict) or "objects" in features or len(images) != 1:
        return rows.with_format(None)
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    plain = {key: inner[key] for key in ("image_id", "width", "height") if key in inner}
    own = {key: value for key, value in inner.items() if key not in plain}
    objects = inner.get("objects", own)
    new = datasets.Features({"image": datasets.Image(), "objects": objects, "__key__": features["__key__"], **plain})

    def columns(row: dict[str, Any]) -> dict[str, Any]:
        content = row["json"]
        found = content["objects"] if "objects" in inner else {key: content.get(key) for key in own}
        return {"image": row[images[0]], "objects": found, **{key: content.get(key) for key in plain}}

    return rows.with_format(None).map(columns, features=new, remove_columns=[*images, "json", "__url__"])


def known_rows(rows: datasets.IterableDataset, most: int | None) -> int | None:
    """The number of rows, where the data set says it."""
    facts = (rows.info.splits or {}).get(str(rows.split))
    count = None if facts is None else facts.num_examples
    return count if most is None or count is None else min(most, count)


def content_of(image: Mapping[str, Any] | None, name: str) -> bytes:
    """The bytes of an undecoded image, also from the Hub.

    Raises:
        `UnreadableImageError`: there are none.
    """
    content, path = (None, None) if image is None else (image["bytes"], image["path"])
    if content is not None:
        return content
    if path is None:
        raise UnreadableImageError(f"The image {name} is missing: set `--skip_unreadable_images`, or remove the row.")
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableImageError(
            f"The image {name} cannot be read ({error}): repair or remove it, or set `--skip_unreadable_images`."
        ) from error
