"""One measurement of `benchmark.py scale`: run as a script in a process of its own, with any checkout of the package.

Prints a JSON object: CPU seconds, growth of the peak memory in MB, and figures to compare.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch


BATCH = 8
COCO_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


@contextmanager
def measured(into: dict[str, Any], name: str) -> Iterator[None]:
    from hf_detrkd.evaluation.efficiency import peak_memory

    cpu = torch.device("cpu")
    with suppress(OSError):  # Linux forgets the peak of what was made before
        Path("/proc/self/clear_refs").write_text("5")
    before, start = peak_memory(cpu), time.process_time()
    yield
    into[name] = {"seconds": time.process_time() - start, "megabytes": 1024 * (peak_memory(cpu) - before)}


def scene(images: int, boxes: int, detections: int, classes: int) -> dict[str, np.ndarray]:
    """Ground truth, of which one box in 100 is a crowd, and detections, the first of which lie near it, as arrays
    `(images, ...)`, boxes as corners."""
    generator = np.random.default_rng(0)

    def corners(count: int) -> np.ndarray:
        middle = generator.uniform(0, 640, (images, count, 2))
        half = np.exp(generator.uniform(np.log(4), np.log(200), (images, count, 2)))
        low = np.clip(middle - half, 0, 639)
        return np.concatenate([low, np.clip(middle + half, low + 1, 640)], axis=-1)

    truth, labels = corners(boxes), generator.integers(0, classes, (images, boxes))
    found, named = corners(detections), generator.integers(0, classes, (images, detections))
    scores = generator.random((images, detections)) / 2
    near = np.arange(min(detections, 3 * boxes))
    of = near % boxes
    sides = truth[:, of, 2:] - truth[:, of, :2]
    found[:, near] = truth[:, of] + generator.normal(0, 0.08, (images, len(near), 4)) * np.tile(sides, 2)
    found[..., 2:] = np.maximum(found[..., 2:], found[..., :2] + 0.5)
    named[:, near] = np.where(generator.random((images, len(near))) < 0.8, labels[:, of], named[:, near])
    scores[:, near] = generator.random((images, len(near)))
    area = (truth[..., 2:] - truth[..., :2]).prod(-1)
    crowds = (generator.random(labels.shape) < 0.01).astype(np.int64)
    answers: dict[str, np.ndarray] = {
        "boxes": found.astype(np.float32),
        "labels": named,
        "scores": scores.astype(np.float32),
    }
    return answers | {"truth": truth, "truth_labels": labels, "area": area, "iscrowd": crowds}


def flat(data: dict[str, np.ndarray]) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Image, label, box (x, y, width, height) and score of every detection; the last two of truth are area, crowd."""

    def rows(boxes: np.ndarray, labels: np.ndarray, *more: np.ndarray) -> tuple[np.ndarray, ...]:
        image = np.repeat(np.arange(len(boxes)), boxes.shape[1])
        box = boxes.astype(np.float64).reshape(-1, 4)
        box[:, 2:] -= box[:, :2]
        return image, labels.reshape(-1), box, *(one.astype(np.float64).reshape(-1) for one in more)

    truth = rows(data["truth"], data["truth_labels"], data["area"], data["iscrowd"])
    return rows(data["boxes"], data["labels"], data["scores"]), truth


def annotations(columns: tuple[np.ndarray, ...], *names: str) -> list[dict[str, Any]]:
    return [
        {"id": n, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3]}
        | dict(zip(names, more, strict=True))
        for n, (image, label, box, *more) in enumerate(zip(*(c.tolist() for c in columns), strict=True), start=1)
    ]


def stream(**sizes: int) -> dict[str, Any]:
    """The evaluation of a training: batches of tensors, and the figures after the last one."""
    from transformers import EvalPrediction

    import hf_detrkd.evaluation.metric  # noqa: F401 which the evaluator imports when it is called
    from hf_detrkd.evaluation import CocoEvaluator

    data = {name: torch.from_numpy(value) for name, value in scene(**sizes).items()}
    result: dict[str, Any] = {}
    evaluator = CocoEvaluator({number: f"class {number}" for number in range(sizes["classes"])})
    kinds = {"boxes": "truth", "labels": "truth_labels", "area": "area", "iscrowd": "iscrowd"}

    def batch(start: int) -> EvalPrediction:
        part = slice(start, start + BATCH)
        truth = {name: data[kind][part] for name, kind in kinds.items()}
        truth["image_id"] = torch.arange(sizes["images"])[part]
        return EvalPrediction({name: data[name][part] for name in ("boxes", "labels", "scores")}, truth)

    *most, last = range(0, sizes["images"], BATCH)
    with measured(result, "adding"):
        for start in most:
            evaluator(batch(start), compute_result=False)
    with measured(result, "computing"):
        figures = evaluator(batch(last), compute_result=True)
    return result | {"map": figures["map"]}


def library(**sizes: int) -> dict[str, Any]:
    """faster-coco-eval with a dict for each box, and the share of its C++ part."""
    import faster_coco_eval.core.faster_eval_api as api
    from faster_coco_eval.core.coco import COCO

    found, truth = flat(scene(**sizes))
    result: dict[str, Any] = {}
    compiled, kept = api._C.COCOevalEvaluateAccumulate, api._C

    class Timed:
        Dataset = kept.Dataset

        @staticmethod
        def COCOevalEvaluateAccumulate(*arguments: Any) -> Any:
            with measured(result, "C++"):
                return compiled(*arguments)

    api._C = Timed
    frame = {
        "images": [{"id": number} for number in range(sizes["images"])],
        "categories": [{"id": number, "name": str(number)} for number in range(sizes["classes"])],
    }
    with measured(result, "computing"):
        boxes = annotations(truth, "area", "iscrowd"), annotations(found, "score")
        evaluator = api.COCOeval_faster(*(COCO({**frame, "annotations": one}) for one in boxes), iouType="bbox")
        evaluator.run()
    return result | {"map": float(evaluator.stats[0])}


def hotcoco(**sizes: int) -> dict[str, Any]:
    import hotcoco

    (image, label, box, score), truth = flat(scene(**sizes))
    frame = [{"id": n} for n in range(sizes["images"])], [{"id": n, "name": str(n)} for n in range(sizes["classes"])]
    result: dict[str, Any] = {}
    with measured(result, "computing"):
        real = hotcoco.COCO.from_arrays(*frame, *truth[:3], area=truth[3], iscrowd=truth[4].astype(np.int64))
        evaluator = hotcoco.COCOeval(real, real.load_res(np.column_stack([image, box, score, label])), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        figure = evaluator.get_results()["AP"]
    return result | {"map": figure}


def files(folder: str, **sizes: int) -> dict[str, Any]:
    """A COCO results file."""
    from hf_detrkd.evaluation.coco_results import evaluate_coco_files

    result: dict[str, Any] = {}
    with measured(result, "computing"):
        figures = evaluate_coco_files(Path(folder, "truth.json"), Path(folder, "results.json"))
    return result | {"map": figures["map"]}


def write_files(folder: str, **sizes: int) -> dict[str, Any]:
    found, truth = flat(scene(**sizes))
    frame = {
        "images": [{"id": number} for number in range(sizes["images"])],
        "categories": [{"id": number, "name": str(number)} for number in range(sizes["classes"])],
    }
    crowds = [entry | {"iscrowd": int(entry["iscrowd"])} for entry in annotations(truth, "area", "iscrowd")]
    Path(folder, "truth.json").write_text(json.dumps(frame | {"annotations": crowds}))
    Path(folder, "results.json").write_text(json.dumps(annotations(found, "score")))
    return {}


def write_coco(folder: str, images: int, boxes: int) -> dict[str, Any]:
    """A COCO file with polygons, as `instances_train2017.json`, and empty image files."""
    generator, place = np.random.default_rng(0), Path(folder)
    (place / "annotations").mkdir(parents=True)
    (place / "val").mkdir()
    sides = generator.integers(300, 641, (images, 2)).tolist()
    listed = [
        {"id": 5 * n, "file_name": f"{5 * n:012d}.jpg", "width": w, "height": h} for n, (w, h) in enumerate(sides)
    ]
    for image in listed:
        (place / "val" / image["file_name"]).touch()
    categories = json.dumps([{"id": number, "name": f"class {number}"} for number in COCO_IDS])
    with (place / "annotations" / "instances_val.json").open("w") as file:
        file.write(f'{{"images": {json.dumps(listed)}, "categories": {categories}, "annotations": [')
        for number in range(boxes):
            image, category, *spot = generator.random(6).tolist()
            of = listed[int(image * images)]
            x, y, w, h = (round(v * s, 2) for v, s in zip(spot, 2 * [of["width"], of["height"]], strict=True))
            entry = {"id": number, "image_id": of["id"], "category_id": COCO_IDS[int(category * 80)], "iscrowd": 0}
            entry |= {"bbox": [x, y, w, h], "area": round(w * h / 2, 4), "segmentation": [[x + i for i in range(40)]]}
            file.write("," * (number > 0) + json.dumps(entry))
        file.write("]}")
    return {}


def load(folder: str, index: bool = True) -> dict[str, Any]:
    """A COCO file, with its index in the cache or without."""
    from hf_detrkd.data import load_detection_split

    if not index:
        from hf_detrkd.data.layouts import coco_index

        coco_index.LEAST = 2**60
    result: dict[str, Any] = {}
    with measured(result, "loading"):
        dataset = load_detection_split(folder)
    return result | {"images": len(dataset), "repaired": repr(dataset.repaired)}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    case.__name__: case for case in (stream, library, hotcoco, files, write_files, write_coco, load)
}


if __name__ == "__main__":
    print("\n" + json.dumps(CASES[sys.argv[1]](**json.loads(sys.argv[2]))))
