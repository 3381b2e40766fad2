"""Worker process that performs one Hub operation: `python worker.py ask|check|push ...`.

[`HubPush`] starts it by its path, so that it needs `huggingface_hub` only, shares nothing with the training, and can
be killed if the Hub hangs. The token comes from the environment; the result is one JSON object on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id


PASSING = (408, 409, 412, 429)  # retryable statuses below 500: time-out, conflicts, too many requests


def attempt(action: Callable[[], Any], given: argparse.Namespace) -> Any:
    """The action's result, with a few retries if the error may be temporary."""
    for wait in given.waits:
        try:
            return action()
        except Exception as error:  # of any layer below: HTTP, sockets, TLS
            if kind_of(error) != "passing":
                raise
            if not given.quiet:
                print(f"The Hub did not respond ({describe(error)}): retrying in {wait} s.", file=sys.stderr)
            time.sleep(max(wait, retry_after(error)))
    return action()


def kind_of(error: Exception) -> str:
    """`refused` (this token has no permission), `invalid` (nobody has) or `passing` (a retry may succeed)."""
    status = status_of(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return "refused"
    if isinstance(error, ValueError) or (status is not None and status < 500 and status not in PASSING):
        return "invalid"
    return "passing"


def chain_of(error: BaseException | None) -> list[BaseException]:
    """An error and its causes: the client wraps storage errors."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def response_of(error: Exception) -> Any:
    """The Hub's response, if there was one."""
    answers = (getattr(one, "response", None) for one in chain_of(error))
    return next((answer for answer in answers if answer is not None), None)


def status_of(error: Exception) -> int | None:
    return getattr(response_of(error), "status_code", None)


def retry_after(error: Exception) -> float:
    """Seconds to wait according to the Hub, at most a minute."""
    asked = getattr(response_of(error), "headers", {}).get("Retry-After", "0")
    return min(60.0, float(asked)) if asked.isdigit() else 0.0


def describe(error: Exception) -> str:
    """The first lines of an error and of the Hub errors that caused it."""
    chain = [one for one in chain_of(error) if one is error or isinstance(one, HfHubHTTPError)]
    lines = [next(iter(str(one).strip().splitlines()), "") or type(one).__name__ for one in chain]
    return " ".join(dict.fromkeys(lines))


def made(api: HfApi, given: argparse.Namespace) -> str:
    """The repository's full name; it is created if it does not exist."""
    create = partial(api.create_repo, given.repo_id, private=given.private, exist_ok=True, repo_type=given.repo_type)
    return attempt(create, given).repo_id


def check(api: HfApi, given: argparse.Namespace) -> dict[str, Any]:
    """Creates the repository if it does not exist, and checks write access."""
    repo_id = made(api, given)
    attempt(lambda: api.auth_check(repo_id, write=True, repo_type=given.repo_type), given)
    return {"repo_id": repo_id}


def ask(api: HfApi, given: argparse.Namespace) -> dict[str, Any]:
    """Checks write access without creating the repository.

    Raises:
        PermissionError: its namespace belongs to someone else, or the token is read-only.
    """
    account = attempt(api.whoami, given)
    name, _, _ = given.repo_id.rpartition("/")
    repo_id = given.repo_id if name else f"{account['name']}/{given.repo_id}"
    validate_repo_id(repo_id)
    try:
        attempt(lambda: api.auth_check(repo_id, write=True, repo_type=given.repo_type), given)
    except RepositoryNotFoundError:
        owners = {account["name"], *(one["name"] for one in account.get("orgs") or [])}
        if repo_id.partition("/")[0] not in owners:
            raise PermissionError(f"{account['name']} is not a member of this organisation") from None
        if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise PermissionError("the token is read-only") from None
    return {"repo_id": repo_id}


def push(api: HfApi, given: argparse.Namespace) -> dict[str, Any]:
    """Uploads a folder as one commit; files that the Hub already has are not sent again."""
    # Again, since it was not created if the Hub was unreachable when the run started.
    repo_id = made(api, given)
    if given.revision is not None:
        branch = partial(api.create_branch, repo_id, branch=given.revision, exist_ok=True, repo_type=given.repo_type)
        attempt(branch, given)
    commit = attempt(
        lambda: api.upload_folder(
            repo_id=repo_id,
            repo_type=given.repo_type,
            folder_path=given.folder,
            path_in_repo=given.path_in_repo,
            revision=given.revision,
            commit_message=given.message,
        ),
        given,
    )
    return {"repo_id": repo_id, "commit_url": commit.commit_url, "oid": commit.oid}


ACTIONS = {"ask": ask, "check": check, "push": push}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--repo_id", required=True)
    parser.add_argument("--repo_type", choices=("model", "dataset"), default="model")
    parser.add_argument("--private", action="store_true", help="Make a repository that is created here private.")
    parser.add_argument("--folder")
    parser.add_argument("--path_in_repo")
    parser.add_argument("--revision")
    parser.add_argument("--message")
    parser.add_argument("--waits", type=float, nargs="*", default=[], help="Seconds between attempts.")
    parser.add_argument("--quiet", action="store_true", help="Do not print retries.")
    given = parser.parse_args()
    # Explicit, since the user may have disabled implicit tokens.
    api = HfApi(library_name="hf-detrkd", token=os.environ.get("HF_TOKEN"))
    try:
        answer = ACTIONS[given.action](api, given)
    except Exception as error:  # any error is returned to the caller as data
        answer = {"error": describe(error), "kind": kind_of(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
