# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-detrkd"]
#
# [tool.uv.sources]
# hf-detrkd = { path = "..", editable = true }
# ///
"""Distils a detector into a smaller one, or trains one without a teacher.

accelerate launch scripts/distill.py --config scripts/recipes/quickstart.yaml
accelerate launch scripts/distill.py --method kd_detr --help
uv run scripts/distill.py --config scripts/recipes/quickstart.yaml
"""

import sys

from hf_detrkd.cli.distill import main
from hf_detrkd.cli.screen import run


if __name__ == "__main__":
    sys.exit(run(main))
