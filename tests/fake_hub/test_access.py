"""Whom the Hub of the tests lets in, and that all they sent can be searched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.fake_hub.pushing import STUDENT, quiet
from tests.hub_server import HubServer


pytestmark = quiet


def test_a_wrong_token_is_let_in_nowhere(hub: HubServer, api: HfApi) -> None:
    hub.publish("other/teacher", {"config.json": b"{}"})
    stranger = HfApi(endpoint=hub.url, token="hf_wrong")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("Invalid user token", stranger.whoami),
        ("Invalid credentials in Authorization header", lambda: stranger.model_info("other/teacher")),
        ("Invalid credentials in Authorization header", lambda: stranger.create_repo(STUDENT)),
    ]
    for message, call in calls:
        with pytest.raises(HfHubHTTPError, match=message) as refusal:
            call()
        assert refusal.value.response.status_code == 401
    assert STUDENT not in hub.repos


def test_private_repositories_are_hidden_from_others(hub: HubServer, pushed: HfApi, tmp_path: Path) -> None:
    hub.publish("other/teacher", {"config.json": b"{}"})
    hub.publish("other/secret", {"config.json": b"{}"}, private=True)
    assert not pushed.model_info("other/teacher", token=False).private
    for repo_id, token, status in [(STUDENT, False, 401), ("other/secret", None, 404), ("user/none", None, 404)]:
        with pytest.raises(RepositoryNotFoundError) as refusal:
            pushed.model_info(repo_id, token=token)
        assert refusal.value.response.status_code == status
    with pytest.raises(RepositoryNotFoundError):
        pushed.hf_hub_download(STUDENT, "config.json", token=False, cache_dir=tmp_path / "cache")


def test_the_user_writes_in_his_own_namespace_only(hub: HubServer, api: HfApi) -> None:
    teacher = hub.publish("other/teacher", {"config.json": b"{}"})
    head = teacher.head
    for call in (
        lambda: api.create_repo("other/student"),
        lambda: api.delete_file("config.json", "other/teacher"),
        lambda: api.upload_file(repo_id="other/teacher", path_or_fileobj=b"\0", path_in_repo="a.bin"),
    ):
        with pytest.raises(HfHubHTTPError) as refusal:
            call()
        assert refusal.value.response.status_code == 403
    with pytest.raises(RepositoryNotFoundError):
        api.delete_file("config.json", "other/teacher", token=False)
    assert teacher.head == head and hub.repos.keys() == {"other/teacher"}


def test_a_token_for_reading_reads_and_does_not_write(online: None) -> None:
    with HubServer(read_only=True) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        head = hub.publish(STUDENT, {"config.json": b"{}"}, private=True).head
        assert api.whoami()["auth"]["accessToken"]["role"] == "read"
        assert api.model_info(STUDENT).private
        for call in (lambda: api.create_repo("user/new"), lambda: api.delete_file("config.json", STUDENT)):
            with pytest.raises(HfHubHTTPError) as refusal:
                call()
            assert refusal.value.response.status_code == 403
        assert hub.repos[STUDENT].head == head and hub.repos.keys() == {STUDENT}


def test_all_that_was_sent_can_be_searched_for_secrets(hub: HubServer, api: HfApi) -> None:
    api.create_repo(STUDENT)
    hub.fail("/commit/", status=413)
    with pytest.raises(HfHubHTTPError):
        api.upload_file(repo_id=STUDENT, path_or_fileobj=b"hush, small", path_in_repo="notes.txt")
    api.upload_file(repo_id=STUDENT, path_or_fileobj=b"hush, large", path_in_repo="notes.bin")
    assert b"hush, small" in hub.received and b"hush, large" in hub.received and b"user-agent: " in hub.received
    assert hub.token.encode() not in hub.received
    api.upload_file(repo_id=STUDENT, path_or_fileobj=hub.token.encode(), path_in_repo="token.txt")
    assert hub.token.encode() in hub.received
