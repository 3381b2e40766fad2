"""Pushes the output folder of a run to the Hub: the student with its card, recipe, results and pictures.

    python scripts/push.py outputs/student --hub_model_id user/student

What the Hub has already is not sent again, so that a push which broke off is completed by the same command.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from ..artifacts.hub.push_run import push_run
from ..artifacts.redaction import under_home


@dataclass
class PushArguments:
    """What to push, and where."""

    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository. Default: the one that the run was given, or the folder's name."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a repository that is made now is private. Default: it is."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch; made where it is missing."})
    hub_token: str | None = field(default=None, metadata={"help": "Default: that of `hf auth login` or HF_TOKEN."})
    hub_timeout: float | None = field(
        default=None, metadata={"help": "Seconds to wait for the Hub. Default: as long as it takes."}
    )


def main(argv: list[str]) -> None:
    parser = HfArgumentParser(PushArguments, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", help="Output folder of scripts/distill.py or of a trainer.")
    given = parser.parse_args(argv)
    options = {
        "repo_id": given.hub_model_id,
        "private": given.hub_private_repo,
        "revision": given.hub_revision,
        "token": given.hub_token,
        "patience": given.hub_timeout,
    }
    folder = Path(given.output_dir)
    commit = push_run(folder, **{name: value for name, value in options.items() if value is not None})
    if commit is None:
        sys.exit(1)
    print(f"{under_home(given.output_dir)} is at {commit.commit_url}")
