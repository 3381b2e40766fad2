# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-detrkd"]
#
# [tool.uv.sources]
# hf-detrkd = { path = "..", editable = true }
# ///
"""Measures the detection loss, the methods, the latency of detectors, or what grows with a data set.

python scripts/benchmark.py criterion
python scripts/benchmark.py methods --output_dir outputs/methods
python scripts/benchmark.py latency --models outputs/teacher outputs/student
python scripts/benchmark.py scale
"""

import sys

from hf_detrkd.cli.benchmark.main import main
from hf_detrkd.cli.screen import run


if __name__ == "__main__":
    sys.exit(run(main))
