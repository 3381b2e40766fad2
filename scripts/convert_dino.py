# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-detrkd"]
#
# [tool.uv.sources]
# hf-detrkd = { path = "..", editable = true }
# ///
"""Converts a checkpoint of DINO's original repository, or of detrex.

python scripts/convert_dino.py --checkpoint checkpoint0011_4scale.pth --output_dir dino_r50
"""

import sys

from hf_detrkd.cli.screen import run
from hf_detrkd.models.dino_detr.convert_checkpoint import main


if __name__ == "__main__":
    sys.exit(run(main))
