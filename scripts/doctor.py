# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-detrkd"]
#
# [tool.uv.sources]
# hf-detrkd = { path = "..", editable = true }
# ///
"""Checks data, models, memory and disk of a run without training.

python scripts/doctor.py --config scripts/recipes/quickstart.yaml
"""

import sys

from hf_detrkd.cli.doctor.main import main
from hf_detrkd.cli.screen import run


if __name__ == "__main__":
    sys.exit(run(main))
