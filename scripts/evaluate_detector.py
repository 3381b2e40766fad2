# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-detrkd"]
#
# [tool.uv.sources]
# hf-detrkd = { path = "..", editable = true }
# ///
"""Evaluates a detector on a data set, or a file of detections, by COCO's metrics.

accelerate launch scripts/evaluate_detector.py --model_name_or_path outputs/student --dataset_name path/to/folder
"""

import sys

from hf_detrkd.cli.evaluate import main
from hf_detrkd.cli.screen import run


if __name__ == "__main__":
    sys.exit(run(main))
