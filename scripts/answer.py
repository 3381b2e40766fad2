# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-detrkd"]
#
# [tool.uv.sources]
# hf-detrkd = { path = "..", editable = true }
# ///
"""Stores the answers of a teacher, so that a training reads them instead of running the teacher.

accelerate launch scripts/answer.py --config recipe.yaml --teacher_answers outputs/answers
"""

import sys

from hf_detrkd.cli.answer import main
from hf_detrkd.cli.screen import run


if __name__ == "__main__":
    sys.exit(run(main))
