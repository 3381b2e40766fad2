"""The Hub of the tests, asked by the real client: what is pushed is there, and comes back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel

from tests import tiny
from tests.fake_hub.pushing import FILES, STUDENT, contents, quiet
from tests.hub_server import HubServer


pytestmark = quiet


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
    # By the branch, or by its commit: that depends on the version of transformers.
    fetched = {f"/{STUDENT}/resolve/{revision}/model.safetensors" for revision in ("main", hub.repos[STUDENT].head)}
    assert any(("GET", path, 200) in hub.requests for path in fetched)


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
