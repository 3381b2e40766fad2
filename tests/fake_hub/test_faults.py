"""The Hub of the tests fails on demand, and the real client meets cuts, refusals, delays and a Hub that is down."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import HfHubHTTPError

from tests.fake_hub.pushing import FILES, STUDENT, httpx, quiet, uploads
from tests.hub_server import HubServer


pytestmark = quiet


def test_a_download_that_is_cut_goes_on_where_it_stopped(
    hub: HubServer, pushed: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.fail("GET .*/model.safetensors", drop=True, after_bytes=100_000)
    file = pushed.hf_hub_download(STUDENT, "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(file).read_bytes() == FILES["model.safetensors"]
    whole, rest = [e for e in hub.exchanges if e.method == "GET" and e.path.endswith("/model.safetensors")]
    assert (whole.status, rest.status, rest.headers["range"]) == (0, 206, "bytes=100000-")


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
    with pytest.raises(httpx.TransportError):
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
    with pytest.raises(httpx.TransportError):
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
    with pytest.raises(httpx.TimeoutException):
        pushed.model_info(STUDENT, timeout=0.2)


def test_a_hub_that_went_down_comes_back_on_its_port_with_all_it_had(hub: HubServer, pushed: HfApi) -> None:
    hub.stop()
    hub.stop()  # as good as once
    with pytest.raises(httpx.ConnectError):
        pushed.whoami()
    hub.start()
    hub.start()
    assert pushed.whoami()["name"] == "user"
    assert pushed.model_info(STUDENT).sha == hub.repos[STUDENT].head


def test_an_error_of_the_hub_itself_fails_the_test(online: None) -> None:
    with pytest.raises(AssertionError, match="JSONDecodeError"), HubServer() as hub:
        headers = {"Authorization": f"Bearer {hub.token}"}
        answer = get_session().post(f"{hub.url}/api/repos/create", content=b"{", headers=headers)
        assert answer.status_code == 500
