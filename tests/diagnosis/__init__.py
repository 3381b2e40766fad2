"""The doctor, whose scripts can be imported here, and the package behind it."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
