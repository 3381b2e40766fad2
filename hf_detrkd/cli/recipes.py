"""Lists the recipes that come with the package.

hf-detrkd recipes
hf-detrkd distill --config quickstart
"""

from __future__ import annotations

import argparse
from itertools import takewhile

from .shipped import recipes


def main(argv: list[str]) -> None:
    keeps_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("hf-detrkd recipes", description=__doc__, formatter_class=keeps_lines)
    parser.parse_args(argv)
    found = {name: summary_of(file.read_text()) for name, file in recipes().items()}
    width = max(map(len, found))
    print("\n".join(f"{name:{width}}  {summary}" for name, summary in found.items()))


def summary_of(text: str) -> str:
    """The first sentence of a recipe's comment."""
    lines = takewhile(lambda line: line.startswith("# ") and not line.startswith("#  "), text.splitlines())
    return " ".join(line.removeprefix("# ") for line in lines).partition(". ")[0].rstrip(".:")
