"""Pushes the output folder of a run to the Hub: the student with its card, recipe, results and plots.

    hf-detrkd push outputs/student --hub_model_id user/student

A folder of stored answers (hf-detrkd answer) becomes a data set repository.

Files that the Hub already has are not sent again, so the same command completes an interrupted push.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..answers.manifest import FILE as MANIFEST
from ..artifacts.hub.push_run import push_answers, push_run
from ..artifacts.redaction import under_home
from ..artifacts.run_folder import FACTS, read_json, with_methods
from ..artifacts.whole_files import write_json
from ..methods import METHODS
from .parser import make_parser


@dataclass
class PushArguments:
    """Destination and options of the push."""

    hub_model_id: str | None = field(
        default=None, metadata={"help": "Id of the repository. Default: the run's hub_model_id, or the folder's name."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Make a newly created repository private. Default: true."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch; created if missing. Default: main."})
    hub_token: str | None = field(
        default=None, metadata={"help": "Access token. Default: `hf auth login` or HF_TOKEN."}
    )
    hub_timeout: float | None = field(
        default=None, metadata={"help": "Maximum seconds to wait for the upload. Default: no limit."}
    )


def add_papers(folder: Path) -> None:
    """Adds the papers of the methods to the facts of a run that did not record them yet (0.1.0)."""
    facts = with_methods(read_json(folder / FACTS))
    if (folder / FACTS).is_file() and "papers" not in facts:
        papers = [METHODS[name].paper for name in facts["methods"] if name in METHODS]
        facts["papers"] = [dataclasses.asdict(paper) for paper in papers if paper is not None]
        write_json(folder / FACTS, facts)


def main(argv: list[str]) -> None:
    parser = make_parser(PushArguments, __doc__, prog="hf-detrkd push")
    parser.add_argument(
        "output_dir", help="Output folder of scripts/distill.py or of a trainer, or of scripts/answer.py."
    )
    given = parser.parse_args(argv)
    options = {
        "repo_id": given.hub_model_id,
        "private": given.hub_private_repo,
        "revision": given.hub_revision,
        "token": given.hub_token,
        "timeout": given.hub_timeout,
    }
    folder = Path(given.output_dir)
    chosen = {name: value for name, value in options.items() if value is not None}
    if (folder / MANIFEST).is_file():
        commit = push_answers(folder, **chosen)
    else:
        add_papers(folder)
        commit = push_run(folder, **chosen)
    if commit is None:
        sys.exit(1)
    print(f"{under_home(given.output_dir)} is at {commit.commit_url}")
