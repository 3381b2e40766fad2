# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-detrkd"]
#
# [tool.uv.sources]
# hf-detrkd = { path = "..", editable = true }
# ///
"""Runs a recipe in several variants and seeds.

python scripts/ablate.py --variants scripts/recipes/ablation.yaml --output_dir outputs/ablation
"""

import sys

from hf_detrkd.cli.benchmark.series import main
from hf_detrkd.cli.screen import run


if __name__ == "__main__":
    sys.exit(run(main))
