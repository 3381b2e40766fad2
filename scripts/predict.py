# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-detrkd"]
#
# [tool.uv.sources]
# hf-detrkd = { path = "..", editable = true }
# ///
"""Detects objects in an image or in all images of a folder.

python scripts/predict.py --model_name_or_path outputs/student --input photo.jpg
"""

import sys

from hf_detrkd.cli.predict import main
from hf_detrkd.cli.screen import run


if __name__ == "__main__":
    sys.exit(run(main))
