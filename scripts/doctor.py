"""Checks data, models, memory and disk of a run without training.

python scripts/doctor.py --config scripts/recipes/quickstart.yaml
"""

import sys

from hf_detrkd.cli.doctor.main import main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
