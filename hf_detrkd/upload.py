"""One conversation with the Hub, in a process of its own: `python upload.py check|push ...`.

[`~hf_detrkd.hub.HubPush`] starts it by its path, so that it needs `huggingface_hub` alone, takes nothing from the
training, and can be killed where the Hub hangs. The token comes from the environment; the answer is one JSON object
on the standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError


WAITS = (2, 8)  # seconds between attempts, on top of those of the client for single requests
PASSING = (408, 409, 412, 429)  # refusals below 500 that may pass: time-out, conflicts, too many requests


def attempt(action: Callable[[], Any]) -> Any:
    """The action's result, after a few attempts where the Hub may come back."""
    for wait in WAITS:
        try:
            return action()
        except Exception as error:  # of any layer below: HTTP, sockets, TLS
            if not passes(error):
                raise
            print(f"The Hub did not answer ({describe(error)}): trying again in {wait} s.", file=sys.stderr)
            time.sleep(max(wait, retry_after(error)))
    return action()


def passes(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    status = status_of(error)
    return not isinstance(error, ValueError) and (status is None or status >= 500 or status in PASSING)


def status_of(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def retry_after(error: Exception) -> float:
    """Seconds that the Hub asks to wait, a minute at most."""
    asked = error.response.headers.get("Retry-After", "0") if isinstance(error, HfHubHTTPError) else "0"
    return min(60.0, float(asked)) if asked.isdigit() else 0.0


def describe(error: Exception) -> str:
    """The first line of an error."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def check(api: HfApi, given: argparse.Namespace) -> dict[str, Any]:
    """Makes the repository where there is none, and asks whether it may be written to."""
    repo_id = attempt(lambda: api.create_repo(given.repo_id, private=given.private, exist_ok=True)).repo_id
    attempt(lambda: api.auth_check(repo_id, write=True))
    return {"repo_id": repo_id}


def push(api: HfApi, given: argparse.Namespace) -> dict[str, Any]:
    """Uploads a folder as one commit; what the Hub has already is not sent again."""
    # Once more, since it could not be made if the Hub was away when the run began.
    repo_id = attempt(lambda: api.create_repo(given.repo_id, private=given.private, exist_ok=True)).repo_id
    if given.revision is not None:
        attempt(lambda: api.create_branch(repo_id, branch=given.revision, exist_ok=True))
    commit = attempt(
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=given.folder,
            path_in_repo=given.path_in_repo,
            revision=given.revision,
            commit_message=given.message,
        )
    )
    return {"repo_id": repo_id, "commit_url": commit.commit_url, "oid": commit.oid}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("check", "push"))
    parser.add_argument("--repo_id", required=True)
    parser.add_argument("--private", action="store_true", help="Of a repository that is made here.")
    parser.add_argument("--folder")
    parser.add_argument("--path_in_repo")
    parser.add_argument("--revision")
    parser.add_argument("--message")
    given = parser.parse_args()
    api = HfApi(library_name="hf-detrkd")
    try:
        answer = (check if given.action == "check" else push)(api, given)
    except Exception as error:  # whatever it is, the caller gets it as data
        answer = {"error": describe(error), "status": status_of(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
