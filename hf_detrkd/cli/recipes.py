"""Lists the recipes that come with the package.

hf-detrkd recipes
hf-detrkd distill --config quickstart
"""

from __future__ import annotations

import argparse

from .shipped import recipes


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    found = {name: summary_of(file.read_text()) for name, file in recipes().items()}
    width = max(map(len, found))
    print("\n".join(f"{name:{width}}  {summary}" for name, summary in found.items()))


def summary_of(text: str) -> str:
    """The first sentence of a recipe's comment."""
    first = text.splitlines()[0].removeprefix("#").strip() if text.startswith("#") else ""
    return first.rstrip(":")
