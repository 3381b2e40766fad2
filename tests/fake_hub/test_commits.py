"""Commits that the Hub of the tests refuses leave its repositories as they were."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RemoteEntryNotFoundError

from tests.fake_hub.pushing import STUDENT, quiet
from tests.hub_server import HubServer


pytestmark = quiet


def test_a_commit_on_a_parent_that_is_no_longer_head_is_refused(hub: HubServer, pushed: HfApi) -> None:
    old = hub.repos[STUDENT].head
    pushed.delete_file("config.json", STUDENT, parent_commit=old)
    head = hub.repos[STUDENT].head
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refusal:
        pushed.delete_file("README.md", STUDENT, parent_commit=old)
    assert refusal.value.response.status_code == 412
    assert hub.repos[STUDENT].head == head


def test_a_pull_request_is_refused_and_commits_nothing(hub: HubServer, pushed: HfApi) -> None:
    head = hub.repos[STUDENT].head
    with pytest.raises(BadRequestError, match="Pull requests are left out"):
        pushed.delete_file("config.json", STUDENT, create_pr=True)
    assert hub.repos[STUDENT].head == head


def test_a_card_whose_metadata_is_no_yaml_is_refused(hub: HubServer, pushed: HfApi) -> None:
    head = hub.repos[STUDENT].head
    with pytest.raises(ValueError, match="Invalid metadata"):
        pushed.upload_file(repo_id=STUDENT, path_or_fileobj=b"---\ntags: [\n---\n", path_in_repo="README.md")
    assert hub.repos[STUDENT].head == head


def test_a_large_file_that_is_not_what_was_announced_is_refused(hub: HubServer, api: HfApi) -> None:
    api.create_repo(STUDENT)
    head, oid, owner = hub.repos[STUDENT].head, "0" * 64, {"Authorization": f"Bearer {hub.token}"}
    wanted = {"objects": [{"oid": oid, "size": 1}]}
    batch = get_session().post(f"{hub.url}/{STUDENT}.git/info/lfs/objects/batch", json=wanted, headers=owner).json()
    link = batch["objects"][0]["actions"]["upload"]["href"]
    lines = [
        {"key": "header", "value": {"summary": "Nothing", "description": ""}},
        {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 1}},
    ]
    answers = [
        get_session().put(link, content=b"a"),
        get_session().put(link.partition("?")[0], content=b"a"),
        get_session().post(link, json={"parts": [{"partNumber": 1, "etag": '"0"'}]}),
        get_session().post(
            f"{hub.url}/api/models/{STUDENT}/commit/main",
            content="".join(json.dumps(line) + "\n" for line in lines),
            headers=owner,
        ),
    ]
    assert [answer.status_code for answer in answers] == [400, 403, 400, 400]
    assert not hub.repos[STUDENT].objects and hub.repos[STUDENT].head == head


def test_a_commit_with_one_impossible_operation_does_nothing(hub: HubServer, pushed: HfApi) -> None:
    head = hub.repos[STUDENT].head
    with pytest.raises(RemoteEntryNotFoundError):
        pushed.create_commit(
            STUDENT,
            [CommitOperationAdd("new.json", b"{}"), CommitOperationDelete("none.json")],
            commit_message="Half",
        )
    assert hub.repos[STUDENT].head == head and "new.json" not in hub.repos[STUDENT].files()
