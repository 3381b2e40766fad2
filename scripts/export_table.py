"""Exports every detector family to ONNX and writes the results as a table into a Markdown file.

    python scripts/export_table.py docs/sharing.md
    python scripts/export_table.py docs/sharing.md rt_detr yolos

The detectors are the tiny ones of the test suite; each is first trained on eight generated images, on which its file
is then compared with PyTorch, in batches of one and three. About 20 minutes on two cores; if families are given, only
their rows are replaced.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from hf_detrkd.adapters import DetectorAdapter, adapter_for
from hf_detrkd.export.checked import MODEL, export_checked, export_float16
from hf_detrkd.export.graph import EXPORTER
from hf_detrkd.export.parity import FLOAT16, FLOAT32, OnnxExportError, OnnxParityError
from hf_detrkd.structures.targets import Targets


sys.path.append(str(Path(__file__).parents[1]))  # the tiny detectors are part of the tests
from tests import overfit, tiny


START, END = "<!-- export table: scripts/export_table.py -->", "<!-- end of export table -->"
HEADER = "| family | opset | any batch | MB: PyTorch | ONNX | scores | boxes | 16 bits: MB | others |"
SIZE = 128  # with less, Deformable DETR's fourth level is one pixel, which GroupNorm rejects
WIDTH = 64
ENOUGH = 0.1  # fraction of the first loss at which training stops
NOTE = (
    f"By `{EXPORTER}`, checked with onnxruntime in batches of one and three. Scores and boxes: the largest difference "
    f"from PyTorch, for boxes relative to the image size; tolerances are {FLOAT32.scores:g} and {FLOAT32.boxes:g}. "
    f"In 16 bits they are {FLOAT16.scores:g} and {FLOAT16.boxes:g}, for detections with a score of at least "
    f"{FLOAT16.least_score:g}, and {100 * FLOAT16.others:g} % of these may differ more (others). The detectors are "
    f"tiny and trained on eight images of {SIZE} x {SIZE} pixels."
)


def learned(family: str) -> tuple[DetectorAdapter, dict[str, torch.Tensor]]:
    """A detector trained on eight images, and these images."""
    pixels, targets, classes = overfit.images(SIZE)
    adapter = adapter_for(tiny.build(family, WIDTH, id2label=classes).requires_grad_(True))
    learn(adapter, pixels, targets, overfit.STEPS.get(family, 300))
    adapter.model.eval()
    return adapter, {f"image {number}": image for number, image in enumerate(pixels)}


def learn(adapter: DetectorAdapter, pixels: torch.Tensor, targets: Targets, steps: int) -> None:
    """Trains until the loss is a tenth of the first."""
    optimizer = torch.optim.AdamW(adapter.model.parameters(), 1e-3, weight_decay=0)
    first, adapter.model = None, adapter.model.train()
    for _ in (bar := tqdm(range(steps), desc=adapter.spec.family, leave=False)):
        loss = adapter(pixels, targets=targets)[0].loss
        bar.set_postfix(loss=loss.item())
        first = first or loss.item()
        if loss.item() <= ENOUGH * first:
            return
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.model.parameters(), 1.0)
        optimizer.step()


def row(family: str) -> str:
    """The row of one family: its results, or the reason why the export failed."""
    adapter, images = learned(family)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = export_checked(adapter.model, folder, images)
        except (OnnxExportError, OnnxParityError) as error:
            return line(family, "", "", "", str(error), "", "", "", "")
        file = made["files"][MODEL]
        cells = [made["opset"], "yes" if made["dynamic_batch"] else "no", f"{weights(adapter):.2f}"]
        cells += [f"{file['megabytes']:.2f}", *(f"{file['parity'][name]:.0e}" for name in ("scores", "boxes"))]
        try:
            half = export_float16(adapter.model, folder, images)
        except (OnnxExportError, OnnxParityError) as error:
            share = re.search(r"\d+ of \d+", str(error))
            return line(family, *cells, "", str(error) if share is None else f"{share[0]}: refused")
        return line(family, *cells, f"{half['megabytes']:.2f}", "{beyond} of {compared}".format(**half["parity"]))


def weights(adapter: DetectorAdapter) -> float:
    """Size of all parameters and buffers, in 1e6 bytes."""
    values = [*adapter.model.parameters(), *adapter.model.buffers()]
    return sum(value.numel() * value.element_size() for value in values) / 1e6


def line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def rows_in(text: str) -> dict[str, str]:
    """The table's rows by family, from a page that has one."""
    table = text.partition(START)[2].partition(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return {line.split("|")[1].strip(): line for line in lines}


def with_rows(text: str, rows: dict[str, str]) -> str:
    """The page with these rows, in the order of the families."""
    kept = [rows[family] for family in tiny.DETECTORS if family in rows]
    table = [NOTE, "", HEADER, "|---" * (HEADER.count("|") - 1) + "|", *kept]
    return text.partition(START)[0] + "\n".join([START, *table, END]) + text.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="Markdown file that contains the table's two markers.")
    parser.add_argument(
        "families", nargs="*", default=tiny.DETECTORS, metavar="FAMILY", help="Families to export. Default: all."
    )
    given = parser.parse_args()
    if START not in given.page.read_text() or END not in given.page.read_text():
        raise ValueError(f"{given.page} must contain the lines {START} and {END}, between which the table is written.")
    transformers.logging.set_verbosity_error()
    for family in given.families:
        torch.manual_seed(0)
        made = row(family)
        print(made, flush=True)
        text = given.page.read_text()
        given.page.write_text(with_rows(text, rows_in(text) | {family: made}))


if __name__ == "__main__":
    main()
