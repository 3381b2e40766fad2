"""Exports every detector family to ONNX and prints as a Markdown table what came of it.

    python scripts/export_table.py
    python scripts/export_table.py rt_detr yolos

The detectors are the test suite's: tiny, with random weights. Differences are to PyTorch over three generated images,
in batches of one and of three; of boxes, in shares of the image.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torchvision.transforms.v2 import functional as F

from hf_detrkd.data import load_detection_split
from hf_detrkd.export import MODEL, export_checked, export_float16
from hf_detrkd.onnx_parity import OnnxExportError, OnnxParityError


sys.path.append(str(Path(__file__).parents[1]))  # the tiny detectors live beside the tests
from tests import tiny


HEADER = "| family | exporter | opset | any batch | scores | boxes | 16 bits: scores | boxes | remarks |"
SIZE = 128  # with less, Deformable DETR's fourth level is one pixel, which GroupNorm refuses


def images(count: int = 3) -> dict[str, torch.Tensor]:
    """Generated images as a processor without normalisation makes them."""
    records = load_detection_split("shapes", max_samples=count, shapes_size=(SIZE, SIZE)).records
    return {record.name: F.to_dtype(F.to_image(record.load()), torch.float32, scale=True) for record in records}


def row(family: str) -> str:
    """One family's line."""
    model, pixels = tiny.build(family), images()
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = export_checked(model, folder, pixels)
        except (OnnxExportError, OnnxParityError) as error:
            return line(family, "", "", "", "", "", "", "", error)
        remarks, parity = [], made["files"][MODEL]["parity"]
        if not parity["rows_agree"]:
            remarks.append("rows in another order")
        try:
            half = figures(export_float16(model, folder, pixels)["parity"])
        except (OnnxExportError, OnnxParityError) as error:
            half = ["fails", ""]
            remarks.append(f"16 bits: {str(error).partition(' The file is kept')[0]}")
    how = [made["exporter"], made["opset"], "yes" if made["dynamic_batch"] else "no"]
    return line(family, *how, *figures(parity), *half, "; ".join(remarks))


def figures(parity: dict[str, Any]) -> list[str]:
    return [f"{parity[name]:.1e}" for name in ("scores", "boxes")]


def line(*cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=tiny.DETECTORS, metavar="FAMILY", help="Default: all.")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(HEADER, "|---" * HEADER.count(" | ") + "|---|", sep="\n", flush=True)
    for family in given.families:
        print(row(family), flush=True)


if __name__ == "__main__":
    main()
