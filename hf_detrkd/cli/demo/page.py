"""The page of the demo, made with gradio, which the extra `demo` installs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


try:
    import gradio as gr
except ImportError as error:
    raise ImportError(
        f"The demo needs gradio ({error}): pip install 'hf-detrkd[demo]', or in a checkout pip install '.[demo]'."
    ) from error

from ...artifacts.markdown import code
from ...artifacts.redaction import portable
from ...data import UnreadableImageError
from ...data.images import read_image
from .comparison import BOXES, LoadedDetector, Result, boxes, colors_of, compare, figures, picture


TITLE = "Object detection"
BUTTONS: Any = ["download", "fullscreen"]


def build_page(
    detectors: Sequence[LoadedDetector], examples: Sequence[Path] = (), threshold: float = 0.5
) -> gr.Blocks:
    """The page: an image in; pictures, latencies and boxes of every detector out.

    The detectors run when the image changes; the threshold only draws their detections again.

    Args:
        detectors (`list[LoadedDetector]`)
        examples (`list[Path]`): image files to choose from.
        threshold (`float`): the slider's first value.
    """
    colors = colors_of(detectors)

    def show(results: list[Result] | None, image: str | None, threshold: float) -> list[Any]:
        if results is None or image is None:
            return [*[None] * len(detectors), None, []]
        content = read_image(image, Path(image).name)
        pictures = [picture(result, content, threshold, colors) for result in results]
        return [*pictures, figures(results, threshold), boxes(results, threshold)]

    def run(image: str | None, threshold: float) -> list[Any]:
        try:
            results = None if image is None else compare(detectors, read_image(image, Path(image).name))
        except UnreadableImageError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return [results, *show(results, image, threshold)]

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n{_description(detectors)}")
        results = gr.State(None)
        with gr.Row():
            with gr.Column():
                # Mode None: the file as it is, which is read as in training.
                image = gr.Image(type="filepath", image_mode=None, label="Image", height=320)
            with gr.Column():
                slider = gr.Slider(0, 1, threshold, step=0.01, label="Score threshold")
                table = gr.Markdown(label="Figures", min_height=150)
        if examples:
            gr.Examples([[str(file)] for file in examples], image, label="Examples")
        with gr.Row():
            pictures = [gr.Image(label=one.title, format="png", buttons=BUTTONS) for one in detectors]
        with gr.Accordion("Boxes", open=False):
            rows = gr.Dataframe(headers=list(BOXES), interactive=False, show_label=False)
        shown = [*pictures, table, rows]
        image.change(run, [image, slider], [results, *shown], api_name="detect")
        slider.change(show, [results, image, slider], shown, api_visibility="private", show_progress="hidden")
    return page


def _description(detectors: Sequence[LoadedDetector]) -> str:
    return " · ".join(f"{one.title} {code(portable(one.name))}" for one in detectors)
