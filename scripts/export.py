# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-detrkd[export]"]
#
# [tool.uv.sources]
# hf-detrkd = { path = "..", editable = true }
# ///
"""Exports a detector to ONNX and compares the file with PyTorch.

python scripts/export.py --model_name_or_path outputs/student --output_dir outputs/onnx --input photos
"""

import sys

from hf_detrkd.cli.export import main
from hf_detrkd.cli.screen import run


if __name__ == "__main__":
    sys.exit(run(main))
