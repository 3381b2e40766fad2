"""The Hub of the tests, asked by the real client."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, close_session, constants, get_session
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedModel

from tests import tiny
from tests.hub_server import HubServer


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own uploads

STUDENT = "user/student"
FILES = {
    "README.md": b"---\npipeline_tag: object-detection\ntags: [shapes]\n---\n# A student\n",
    "config.json": b'{"model_type": "detr"}',
    "empty.bin": b"",
    "model.safetensors": bytes(range(256)) * 1200,
    "pictures/first.png": b"\x89PNG\r\n\0\0",
    "pictures/more/second.txt": "Größe".encode(),
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets this process ask the Hub, as [`HubServer.environment`] lets others."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield
    close_session()


@pytest.fixture
def api(hub: HubServer, online: None) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        file = tmp_path / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path / "folder"


@pytest.fixture
def pushed(api: HfApi, folder: Path) -> HfApi:
    """A client that has made a private repository and uploaded the folder."""
    api.create_repo(STUDENT, private=True)
    api.upload_folder(repo_id=STUDENT, folder_path=folder)
    return api


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def uploads(hub: HubServer) -> list[int]:
    """Statuses of the large files' uploads."""
    return [status for method, _, status in hub.requests if method == "PUT"]


def test_a_folder_arrives_in_one_commit_and_comes_back_byte_for_byte(
    hub: HubServer, pushed: HfApi, tmp_path: Path
) -> None:
    repo = hub.repos[STUDENT]
    assert repo.private and len(repo.commits) == 2 and repo.head == repo.commits[-1].sha
    assert repo.commits[-1].message == "Upload folder using huggingface_hub"
    assert repo.commits[-1].large == {"model.safetensors", "pictures/first.png"}
    assert repo.files() == FILES | {".gitattributes": repo.commits[0].files[".gitattributes"]}
    snapshot = pushed.snapshot_download(STUDENT, cache_dir=tmp_path / "cache")
    assert Path(snapshot).name == repo.head
    assert contents(snapshot) == repo.files()


def test_the_hub_tells_what_the_client_asks_of_a_model(hub: HubServer, pushed: HfApi) -> None:
    info, repo = pushed.model_info(STUDENT, files_metadata=True), hub.repos[STUDENT]
    assert (info.id, info.sha, info.private, info.pipeline_tag) == (STUDENT, repo.head, True, "object-detection")
    siblings = info.siblings or []
    assert {file.rfilename: file.size for file in siblings} == {k: len(v) for k, v in repo.files().items()}
    assert [file.rfilename for file in siblings if file.lfs] == ["model.safetensors", "pictures/first.png"]
    assert [row.path for row in pushed.list_repo_tree(STUDENT, "pictures")] == ["pictures/more", "pictures/first.png"]
    assert [row.path for row in pushed.get_paths_info(STUDENT, ["config.json", "none"])] == ["config.json"]
    assert pushed.file_exists(STUDENT, "config.json") and not pushed.file_exists(STUDENT, "none.json")
    assert pushed.repo_exists(STUDENT) and not pushed.repo_exists("user/none")
    with pytest.raises(RemoteEntryNotFoundError):
        list(pushed.list_repo_tree(STUDENT, "none"))
    with pytest.raises(RevisionNotFoundError):
        pushed.model_info(STUDENT, revision="none")


def test_the_same_folder_again_sends_no_file_and_makes_no_commit(hub: HubServer, pushed: HfApi, folder: Path) -> None:
    head, before = hub.repos[STUDENT].head, len(hub.exchanges)
    assert pushed.upload_folder(repo_id=STUDENT, folder_path=folder).oid == head
    assert hub.repos[STUDENT].head == head
    assert not any(method == "PUT" or "/commit/" in path for method, path, _ in hub.requests[before:])

    (folder / "config.json").write_bytes(b"{}")
    pushed.upload_folder(repo_id=STUDENT, folder_path=folder)
    assert hub.repos[STUDENT].files()["config.json"] == b"{}"
    assert hub.exchanges[-1].body.count(b"\n") == 2  # the header, and one file
    assert hub.repos[STUDENT].files(head)["config.json"] == FILES["config.json"]


def test_a_file_above_the_size_of_a_part_arrives_in_parts(online: None, folder: Path) -> None:
    with HubServer(part_bytes=100_000) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo(STUDENT)
        api.upload_folder(repo_id=STUDENT, folder_path=folder)
        assert [len(e.body) for e in hub.exchanges if "&part=" in e.path] == [100_000, 100_000, 100_000, 7_200]
        assert hub.repos[STUDENT].files()["model.safetensors"] == FILES["model.safetensors"]


def test_a_process_with_an_empty_cache_loads_the_same_model_by_its_name(
    hub: HubServer, api: HfApi, build: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model, batch = build("detr"), tiny.batch()
    model.save_pretrained(tmp_path / "model")
    api.create_repo(STUDENT, private=True)
    api.upload_folder(repo_id=STUDENT, folder_path=tmp_path / "model")
    torch.save(batch["pixel_values"], tmp_path / "pixels.pt")
    code = f"""
import torch
from transformers import AutoModelForObjectDetection
torch.set_num_threads(1)
with torch.no_grad():
    outputs = AutoModelForObjectDetection.from_pretrained("{STUDENT}")(torch.load("pixels.pt"))
torch.save((outputs.logits, outputs.pred_boxes), "outputs.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=hub.environment(tmp_path / "home"), check=True)
    with torch.no_grad():
        outputs = model(batch["pixel_values"])
    torch.testing.assert_close(
        torch.load(tmp_path / "outputs.pt"), (outputs.logits, outputs.pred_boxes), rtol=0, atol=0
    )
    assert ("GET", f"/{STUDENT}/resolve/{hub.repos[STUDENT].head}/model.safetensors", 200) in hub.requests


@pytest.mark.parametrize(
    ("asked", "status", "first", "end"),
    [("bytes=2-4", 206, 2, 5), ("bytes=7-", 206, 7, 10), ("bytes=-3", 206, 7, 10), ("bytes=10-", 416, 0, 0)],
)
def test_a_range_of_a_file_is_answered(
    hub: HubServer, api: HfApi, asked: str, status: int, first: int, end: int
) -> None:
    hub.publish("other/teacher", {"digits": b"0123456789"})
    answer = get_session().get(f"{hub.url}/other/teacher/resolve/main/digits", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (status, b"0123456789"[first:end])
    assert answer.headers["Content-Range"] == (f"bytes {first}-{end - 1}/10" if end else "bytes */10")


def test_a_download_that_is_cut_goes_on_where_it_stopped(
    hub: HubServer, pushed: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.fail("GET .*/model.safetensors", drop=True, after_bytes=100_000)
    file = pushed.hf_hub_download(STUDENT, "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(file).read_bytes() == FILES["model.safetensors"]
    whole, rest = [e for e in hub.exchanges if e.method == "GET" and e.path.endswith("/model.safetensors")]
    assert (whole.status, rest.status, rest.headers["range"]) == (0, 206, "bytes=100000-")


def test_files_and_folders_are_deleted_and_old_commits_keep_them(hub: HubServer, pushed: HfApi) -> None:
    repo, old = hub.repos[STUDENT], hub.repos[STUDENT].head
    pushed.delete_file("config.json", STUDENT)
    pushed.delete_folder("pictures", STUDENT)
    assert repo.files().keys() == {".gitattributes", "README.md", "empty.bin", "model.safetensors"}
    assert repo.files(old) | FILES == repo.files(old)
    assert pushed.file_exists(STUDENT, "config.json", revision=old)
    pushed.delete_repo(STUDENT)
    assert not pushed.repo_exists(STUDENT) and not hub.repos


def test_a_branch_takes_commits_that_main_does_not_see(hub: HubServer, pushed: HfApi) -> None:
    head = hub.repos[STUDENT].head
    pushed.create_branch(STUDENT, branch="step/100")
    pushed.upload_file(repo_id=STUDENT, path_or_fileobj=b"{}", path_in_repo="config.json", revision="step/100")
    assert hub.repos[STUDENT].head == head
    assert hub.repos[STUDENT].files("step/100")["config.json"] == b"{}"
    assert {ref.name: ref.target_commit == head for ref in pushed.list_repo_refs(STUDENT).branches} == {
        "main": True,
        "step/100": False,
    }
    with pytest.raises(HfHubHTTPError, match="409"):
        pushed.create_branch(STUDENT, branch="step/100")
    pushed.create_branch(STUDENT, branch="step/100", exist_ok=True)


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


def test_a_large_file_that_is_cut_on_its_way_is_sent_again(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(STUDENT)
    (folder / "pictures/first.png").unlink()
    fault = hub.fail("PUT", drop=True, after_bytes=1000)
    api.upload_folder(repo_id=STUDENT, folder_path=folder)
    assert fault.times == 0 and uploads(hub) == [0, 200]
    assert [len(e.body) for e in hub.exchanges if e.method == "PUT"] == [1000, 307_200]
    assert hub.repos[STUDENT].files()["model.safetensors"] == FILES["model.safetensors"]


def test_a_commit_that_is_cut_on_its_way_leaves_the_head_and_the_next_one_sends_no_large_file(
    hub: HubServer, api: HfApi, folder: Path
) -> None:
    api.create_repo(STUDENT)
    head = hub.repos[STUDENT].head
    hub.fail("POST .*/commit/", drop=True, after_bytes=100)
    with pytest.raises(httpx2.TransportError):
        api.upload_folder(repo_id=STUDENT, folder_path=folder)
    assert hub.repos[STUDENT].head == head and hub.repos[STUDENT].files().keys() == {".gitattributes"}
    sent = len(uploads(hub))
    api.upload_folder(repo_id=STUDENT, folder_path=folder)
    assert len(uploads(hub)) == sent == 2
    assert hub.repos[STUDENT].files().keys() == FILES.keys() | {".gitattributes"}


def test_a_commit_whose_answer_is_lost_is_there_and_is_not_made_twice(
    hub: HubServer, api: HfApi, folder: Path
) -> None:
    api.create_repo(STUDENT)
    hub.fail("POST .*/commit/", lose_answer=True)
    with pytest.raises(httpx2.TransportError):
        api.upload_folder(repo_id=STUDENT, folder_path=folder)
    assert len(hub.repos[STUDENT].commits) == 2
    api.upload_folder(repo_id=STUDENT, folder_path=folder)
    assert len(hub.repos[STUDENT].commits) == 2


def test_a_client_that_goes_in_the_middle_of_a_commit_leaves_the_head(hub: HubServer, api: HfApi) -> None:
    api.create_repo(STUDENT)
    head = hub.repos[STUDENT].head
    lines = [
        {"key": "header", "value": {"summary": "Half", "description": ""}},
        {"key": "file", "value": {"path": "a", "content": base64.b64encode(b"a").decode()}},
    ]
    body = "".join(json.dumps(line) + "\n" for line in lines)  # whole lines, but not all of them
    request = f"POST /api/models/{STUDENT}/commit/main HTTP/1.1\r\nAuthorization: Bearer {hub.token}\r\n"
    with socket.create_connection(("127.0.0.1", int(hub.url.rsplit(":", 1)[1]))) as client:
        client.sendall(f"{request}Content-Length: {len(body) + 10}\r\n\r\n{body}".encode())
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""  # no answer
    assert hub.repos[STUDENT].head == head
    assert hub.exchanges[-1].body == body.encode() and hub.exchanges[-1].status == 0


def test_a_client_that_is_killed_in_the_middle_of_an_upload_leaves_the_head(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    api.create_repo(STUDENT)
    head = hub.repos[STUDENT].head
    hub.fail("PUT", delay=600)
    code = (
        "import huggingface_hub as h; h.upload_file(path_or_fileobj=bytes(2**25), path_in_repo='a.bin', repo_id='{}')"
    )
    command = [sys.executable, "-c", code.format(STUDENT)]
    with subprocess.Popen(command, env=hub.environment(tmp_path / "home")) as client:
        hub.wait_for("PUT /lfs/")
        client.kill()
    hub.stop()  # waits for the requests that are under way
    assert uploads(hub) == [0] and not hub.repos[STUDENT].objects
    hub.start()
    assert api.model_info(STUDENT).sha == head


@pytest.mark.parametrize("status", [401, 403, 409, 413, 429, 500, 503])
def test_a_refusal_on_demand_reaches_the_caller_with_its_status(hub: HubServer, pushed: HfApi, status: int) -> None:
    head = hub.repos[STUDENT].head
    hub.fail(f"POST /api/models/{STUDENT}/commit/", status=status, headers={"X-Request-Id": "seven"})
    with pytest.raises(HfHubHTTPError, match=f"Fault {status} on demand") as refusal:
        pushed.delete_file("config.json", STUDENT)
    assert refusal.value.response.status_code == status and refusal.value.request_id == "seven"
    assert hub.repos[STUDENT].head == head
    pushed.delete_file("config.json", STUDENT)
    assert "config.json" not in hub.repos[STUDENT].files()


def test_an_upload_outlasts_a_busy_hub(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(STUDENT)
    hub.fail("/preupload/", status=503, times=1, headers={"Retry-After": "0"})
    hub.fail("PUT", status=429, times=1, headers={"Retry-After": "0"})
    api.upload_folder(repo_id=STUDENT, folder_path=folder)
    assert sorted(uploads(hub)) == [200, 200, 429]
    assert hub.repos[STUDENT].files().keys() > FILES.keys()


def test_a_slow_answer_is_waited_for_or_given_up(hub: HubServer, pushed: HfApi) -> None:
    hub.fail("GET /api/models/", delay=0.5)
    start = time.monotonic()
    assert pushed.model_info(STUDENT).private
    assert time.monotonic() - start >= 0.5
    hub.fail("GET /api/models/", delay=600)
    with pytest.raises(httpx2.TimeoutException):
        pushed.model_info(STUDENT, timeout=0.2)


def test_a_hub_that_went_down_comes_back_on_its_port_with_all_it_had(hub: HubServer, pushed: HfApi) -> None:
    hub.stop()
    hub.stop()  # as good as once
    with pytest.raises(httpx2.ConnectError):
        pushed.whoami()
    hub.start()
    hub.start()
    assert pushed.whoami()["name"] == "user"
    assert pushed.model_info(STUDENT).sha == hub.repos[STUDENT].head


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


def test_an_error_of_the_hub_itself_fails_the_test(online: None) -> None:
    with pytest.raises(AssertionError, match="JSONDecodeError"), HubServer() as hub:
        headers = {"Authorization": f"Bearer {hub.token}"}
        answer = get_session().post(f"{hub.url}/api/repos/create", content=b"{", headers=headers)
        assert answer.status_code == 500
