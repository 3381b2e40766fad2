# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-detrkd"]
#
# [tool.uv.sources]
# hf-detrkd = { path = "..", editable = true }
# ///
"""Pushes the output folder of a run to the Hub.

python scripts/push.py outputs/student --hub_model_id user/student
"""

import sys

from hf_detrkd.cli.push import main
from hf_detrkd.cli.screen import run


if __name__ == "__main__":
    sys.exit(run(main))
