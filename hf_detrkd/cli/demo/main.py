"""Shows a student, and its teacher beside it, on a page in the browser.

    hf-detrkd demo --model_name_or_path outputs/student --teacher_model_name_or_path path/to/teacher

    hf-detrkd demo --model_name_or_path user/student --input photos --space outputs/space

The page takes an image and shows the boxes, scores and latencies of both detectors. `--space` writes the page as a
folder for a Space of the Hub and does not start it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ...data import load_detection_split
from ..parser import make_parser
from ..predict import find_images
from .comparison import LoadedDetector
from .space import check_free, write_space


MOST_EXAMPLES = 8


@dataclass
class DemoArguments:
    """The detectors, the example images, and the server."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the student, or of any detector."})
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the teacher. Default: no teacher."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the student on the Hub. Default: main."}
    )
    teacher_model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the teacher on the Hub. Default: main."}
    )
    input: str | None = field(
        default=None,
        metadata={
            "help": "Image file or folder of example images, the first 8 of which are shown, or shapes, generated "
            "ones. Default: no examples."
        },
    )
    threshold: float = field(default=0.5, metadata={"help": "First value of the score threshold. Default: 0.5."})
    device: str | None = field(
        default=None, metadata={"help": "Device, such as cuda:1 or cpu. Default: a GPU, if any."}
    )
    host: str | None = field(
        default=None,
        metadata={"help": "Address to listen on; 0.0.0.0 lets other machines connect. Default: 127.0.0.1."},
    )
    port: int | None = field(default=None, metadata={"help": "Port. Default: the first free one from 7860."})
    share: bool = field(
        default=False, metadata={"help": "Make the page public through gradio's servers for a week. Default: false."}
    )
    space: str | None = field(
        default=None, metadata={"help": "New folder for a Space of the Hub; the page is not started. Default: none."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold must lie in [0, 1], got {self.threshold}.")
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError(f"--port must be a number from 1 to 65535, got {self.port}.")
        if self.space is not None:
            check_free(Path(self.space))


def example_images(source: str | None, folder: Path) -> list[Path]:
    """The example images: files of the source, or generated ones, which are written to the folder.

    Raises:
        ValueError: the source holds no image.
    """
    if source is None:
        return []
    if source != "shapes":
        return find_images(Path(source))[:MOST_EXAMPLES]
    files = []
    for record in load_detection_split("shapes", max_samples=MOST_EXAMPLES).records:
        files.append(folder / f"shapes_{record.image_id}.png")
        record.load().save(files[-1])
    return files


def load_detectors(given: DemoArguments) -> list[LoadedDetector]:
    """The teacher and the student, or a detector by itself."""
    name, revision = given.model_name_or_path, given.model_revision
    if given.teacher_model_name_or_path is None:
        return [LoadedDetector.load("Detector", name, revision, given.device)]
    teacher, of_teacher = given.teacher_model_name_or_path, given.teacher_model_revision
    return [
        LoadedDetector.load("Teacher", teacher, of_teacher, given.device),
        LoadedDetector.load("Student", name, revision, given.device),
    ]


def main(argv: list[str]) -> None:
    (given,) = make_parser(DemoArguments, __doc__, prog="hf-detrkd demo").parse_args_into_dataclasses(args=argv)
    from .page import build_page  # needs the extra, which is checked before models are loaded

    with tempfile.TemporaryDirectory() as folder:
        examples = example_images(given.input, Path(folder))
        detectors = load_detectors(given)
        if given.space is not None:
            write_space(Path(given.space), detectors, examples, given.threshold)
            print(f"The Space is in {given.space}: `hf upload user/name {given.space} --repo-type space` uploads it.")
            return
        page = build_page(detectors, examples, given.threshold)
    page.launch(server_name=given.host, server_port=given.port, share=given.share)
