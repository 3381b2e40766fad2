from __future__ import annotations

import io
import logging

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Features, Sequence, Value
from PIL import Image, ImageFile

from hf_detrkd.data import (
    DatasetError,
    DetectionTransform,
    UnreadableImageError,
    load_detection_split,
    load_detection_splits,
)


NAMES = ["ant", "cat", "zebra"]
FIELDS = {
    "bbox": Sequence(Value("float32")),
    "category": ClassLabel(names=NAMES),
    "area": Value("float32"),
    "iscrowd": Value("int64"),
}
OBJECTS = [
    [
        {"bbox": [1, 2, 10, 10], "category": 2, "area": 77.0, "iscrowd": 0},
        {"bbox": [0, 0, 40, 30], "category": 1, "area": 1200.0, "iscrowd": 1},
    ],
    [],
    [{"bbox": [5, 6, 7, 8], "category": 0, "area": 50.0, "iscrowd": 0}],
]


def png(width: int = 40, height: int = 30) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (9, 200, 30)).save(stream, "PNG")
    return stream.getvalue()


def make(
    objects=OBJECTS, as_lists=False, keys=tuple(FIELDS), images=None, fields=FIELDS, **columns
) -> datasets.Dataset:
    """Rows in either layout of `objects`: a list of dicts, or a dict of lists."""
    kept = {key: fields[key] for key in keys}
    content = [[{key: entry[key] for key in keys} for entry in row] for row in objects]
    feature = [kept]
    if as_lists:
        content = [{key: [entry[key] for entry in row] for key in keys} for row in content]
        feature = Sequence(kept)
    images = images or [{"bytes": png(), "path": f"photo{i}.png"} for i in range(len(objects))]
    features = {"image": datasets.Image(), "objects": feature}
    features |= {name: Value("int64" if isinstance(values[0], int) else "string") for name, values in columns.items()}
    return datasets.Dataset.from_dict({"image": images, "objects": content, **columns}, features=Features(features))


@pytest.mark.parametrize("as_lists", [True, False], ids=["dict of lists", "list of dicts"])
def test_both_layouts_give_the_same(as_lists):
    dataset = load_detection_split(make(as_lists=as_lists, image_id=[30, 10, 20]), "train")
    assert dataset.classes == NAMES and dataset.category_ids == [0, 1, 2]
    first, empty, last = dataset.records
    assert [first.image_id, empty.image_id, last.image_id] == [30, 10, 20]
    assert first.boxes.tolist() == [[1, 2, 10, 10], [0, 0, 40, 30]] and first.categories.tolist() == [2, 1]
    assert first.iscrowd.tolist() == [False, True] and first.area.tolist() == [77, 1200]
    assert empty.boxes.shape == (0, 4) and last.categories.tolist() == [0]
    assert (first.width, first.height) == (40, 30)
    labels = dataset.with_transform(DetectionTransform((8, 8)))[0]["labels"]
    assert labels["class_labels"].tolist() == [2] and labels["crowd_labels"].tolist() == [1]


@pytest.mark.parametrize("as_lists", [True, False])
def test_optional_fields_have_defaults(as_lists):
    record = load_detection_split(make(as_lists=as_lists, keys=("bbox", "category")), "train").records[2]
    assert record.image_id == 2 and record.area.tolist() == [56] and record.iscrowd.tolist() == [False]
    named = load_detection_split(make(image_id=["x", "y", "z"]), "train")
    assert [record.image_id for record in named.records] == [0, 1, 2], "ids that are no numbers are replaced"


def test_images_are_not_decoded_before_they_are_read(monkeypatch):
    rows, sized = make(), make(width=[40, 40, 40], height=[30, 30, 30])

    def refuse(*args, **kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    load_detection_split(rows, "train")
    monkeypatch.setattr(Image, "open", refuse)
    load_detection_split(sized, "train")


def test_a_set_format_and_a_shuffle_do_not_matter():
    rows = make(image_id=[30, 10, 20]).with_format("torch").select([2, 0])
    dataset = load_detection_split(rows, "train")
    assert [record.image_id for record in dataset.records] == [20, 30]
    assert dataset.records[0].boxes.tolist() == [[5, 6, 7, 8]] and dataset.records[1].load().size == (40, 30)


def test_boxes_outside_are_clipped_by_the_size_in_the_file(caplog):
    objects = [[{**OBJECTS[2][0], "bbox": box} for box in ([30, 20, 30, 30], [50, 0, 5, 5])]]
    with caplog.at_level(logging.WARNING):
        record = load_detection_split(make(objects), "train").records[0]
    assert record.boxes.tolist() == [[30, 20, 10, 10]]
    assert "2 boxes: dropped 1 with no area inside the image, clipped 1 to the image." in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1.0, 2.0, 3.0]}, r"row 1 has the box \[1.0, 2.0, 3.0\], not four numbers"),
        ({"bbox": [1.0, 2.0, float("nan"), 4.0]}, "row 1 has the box .*, which is not finite"),
        ({"bbox": [None, 2.0, 3.0, 4.0]}, "row 1 has the box .*not four numbers"),
        ({"category": -1}, "row 1 has the unknown category -1"),
        ({"category": None}, "row 1 has the unknown category None"),
        ({"iscrowd": 7}, "row 1 has iscrowd 7, which is neither 0 nor 1"),
    ],
)
def test_bad_rows_are_one_error(change, message):
    objects = [OBJECTS[0], [{**OBJECTS[2][0], **change}]]
    with pytest.raises(DatasetError, match=f"given data set, split train has 1 problem to correct .*{message}"):
        load_detection_split(make(objects), "train")


def test_lists_of_different_lengths():
    rows = make(as_lists=True).map(
        lambda row: {"objects": {**row["objects"], "category": row["objects"]["category"][:1]}},
        load_from_cache_file=False,
    )
    with pytest.raises(DatasetError, match="the lists in `objects` of row 0 differ in length"):
        load_detection_split(rows, "train")


def test_repeated_and_missing_image_ids():
    with pytest.raises(DatasetError, match="row 2 repeats the image id 4"):
        load_detection_split(make(image_id=[4, 5, 4]), "train")
    with pytest.raises(DatasetError, match="row 1 has no image id"):
        load_detection_split(make(image_id=[4, None, 5]), "train")


def test_missing_files_are_found_before_training(tmp_path):
    path = tmp_path / "here.png"
    path.write_bytes(png())
    images = [{"bytes": None, "path": str(path)}, {"bytes": None, "path": str(tmp_path / "gone.png")}]
    with pytest.raises(DatasetError, match=r"the image file .*gone.png of row 1 does not exist"):
        load_detection_split(make(OBJECTS[:2], images=images), "train")
    images[1] = images[0]
    assert load_detection_split(make(OBJECTS[:2], images=images), "train").records[1].load().size == (40, 30)


def test_unreadable_rows_name_their_file_or_are_skipped(caplog):
    images = [{"bytes": b"no image", "path": "bad.png"}, {"bytes": png(), "path": "good.png"}]
    rows = make([OBJECTS[2], OBJECTS[2]], images=images)
    with pytest.raises(UnreadableImageError, match=r"split train, row 0 \(bad.png\) cannot be read"):
        load_detection_split(rows, "train").records[0].load()
    with caplog.at_level(logging.WARNING):
        kept = load_detection_split(rows, "train", skip_unreadable_images=True)
    assert [record.image_id for record in kept.records] == [1] and "1 images cannot be read" in caplog.text


def test_sizes_that_disagree_with_the_file():
    rows = make(width=[40, 40, 41], height=[30, 30, 30])
    with pytest.raises(DatasetError, match=r"row 2 is 40x30 pixels .* but its annotations say 41x30"):
        load_detection_split(rows, "train").records[2].load()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (make().remove_columns("objects"), r"the columns `image` and `objects` .*, but has \['image'\]"),
        (make(keys=("bbox", "area")), r"but has \['image', 'objects'\], `objects` has \['area', 'bbox'\]"),
        (make(fields={**FIELDS, "category": Value("float32")}), "`category` .* must hold class names or numbers, or"),
        (
            make().add_column("photo", ["x"] * 3).remove_columns("image").rename_column("photo", "image"),
            "`Image` feature",
        ),
    ],
    ids=["no objects", "no category", "no names", "no image"],
)
def test_columns_outside_the_schema(rows, message):
    with pytest.raises(DatasetError, match=message):
        load_detection_split(rows, "train")


@pytest.mark.parametrize("field", ["category", "categories", "labels"])
@pytest.mark.parametrize(("kind", "values"), [("string", ["ant", "zebra", "moon"]), ("int64", [2, 11, 3])])
def test_categories_without_a_class_label_are_the_names(field, kind, values):
    objects = [{"bbox": [[1, 2, 10, 10], [0, 0, 40, 30]], field: [values[1], values[0]]}, {"bbox": [], field: []}]
    objects.append({"bbox": [[5, 6, 7, 8]], field: [values[2]]})
    features = Features(
        {
            "image": datasets.Image(),
            "objects": {"bbox": Sequence(Sequence(Value("float32"))), field: Sequence(Value(kind))},
        }
    )
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}] * 3, "objects": objects}, features)
    data = load_detection_split(rows, "train")
    assert data.classes == [str(value) for value in sorted(values)]
    named = [[data.classes[c] for c in record.categories] for record in data.records]
    assert named == [[str(values[1]), str(values[0])], [], [str(values[2])]]


def test_every_way_to_hand_over_rows(tmp_path):
    splits = datasets.DatasetDict(train=make(), test=make(OBJECTS[:2]))
    splits.save_to_disk(tmp_path / "both")
    splits["test"].save_to_disk(tmp_path / "one")
    for source in (splits, tmp_path / "both", str(tmp_path / "both")):
        loaded = load_detection_splits(source, max_train_samples=2)
        assert len(loaded.train) == len(loaded.eval) == 2 and loaded.train.classes == NAMES
    assert len(load_detection_split(tmp_path / "one", "train")) == 2
    assert np.array_equal(load_detection_split(splits).records[0].boxes, loaded.eval.records[0].boxes)
    with pytest.raises(
        DatasetError, match=r"no split named validation, val, .* or test to evaluate on: choose one of train"
    ):
        load_detection_splits(make())


def test_a_folder_that_load_dataset_reads(tmp_path):
    make().to_parquet(tmp_path / "train.parquet")
    make(OBJECTS[:2]).to_parquet(tmp_path / "validation.parquet")
    loaded = load_detection_splits(tmp_path)
    assert (len(loaded.train), len(loaded.eval)) == (3, 2) and loaded.train.records[0].load().size == (40, 30)


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(
        DatasetError, match=r"No data set '.*nowhere' was found locally or on the Hub \(.*\): give `shapes`"
    ):
        load_detection_splits(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="streamed data sets cannot be indexed"):
        load_detection_splits(make().to_iterable_dataset())
    with pytest.raises(DatasetError, match=r"split train of .* got IterableDataset: streamed"):
        load_detection_splits({"train": make().to_iterable_dataset()})
    with pytest.raises(DatasetError, match="The split 'train' of the given data set has no images"):
        load_detection_split(make([]), "train")


@pytest.mark.parametrize(("field", "value"), [("bbox", 3), ("category", 1), ("area", 72.0), ("iscrowd", 0)])
def test_one_value_in_place_of_a_list(field, value):
    objects = {"bbox": [[1, 2, 8, 9]], "category": [0], "area": [72.0], "iscrowd": [0]} | {field: value}
    rows = datasets.Dataset.from_list([{"image": {"bytes": png(), "path": None}, "objects": objects}])
    with pytest.raises(DatasetError, match=rf"The field `{field}` in `objects` of .* must be a list, but is Value"):
        load_detection_split(rows.cast_column("image", datasets.Image()), "train")


def test_boxes_may_be_arrays():
    fields = {"bbox": datasets.Array2D(shape=(None, 4), dtype="float32"), "category": Sequence(Value("int64"))}
    objects = [{"bbox": [[1, 2, 8, 9], [0, 0, 4, 4]], "category": [0, 1]}]
    features = Features({"image": datasets.Image(), "objects": fields})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}], "objects": objects}, features)
    assert load_detection_split(rows, "train").records[0].boxes.tolist() == [[1, 2, 8, 9], [0, 0, 4, 4]]
