"""Faults of the Hub during a push: one warning, and nothing that a later push does not complete."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hf_detrkd.artifacts.hub.background_push import HubPush
from hf_detrkd.artifacts.hub.push_run import push_run
from tests.artifacts.hub.folders import STUDENT, leftovers, pushed
from tests.hub_server import HubServer


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("POST .*/preupload/", {"status": 503, "times": 2}),
        ("POST .*/commit/", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("POST .*/commit/", {"status": 409}),
        ("POST .*/commit/", {"status": 500}),
        ("PUT ", {"drop": True, "after_bytes": 1000}),
        ("POST .*/commit/", {"drop": True, "after_bytes": 50}),
        ("POST /api/repos/create", {"status": 502}),
    ],
    ids=["503", "429", "409", "500", "upload cut", "commit cut", "create 502"],
)
def test_what_passes_is_waited_for(hub: HubServer, folder: Path, warnings: list, pattern: str, fault: dict) -> None:
    pending = hub.fail(pattern, **fault)
    assert pushed(HubPush(folder, STUDENT)).oid == hub.repos[STUDENT].head
    assert pending.times == 0 and not warnings


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("POST .*/commit/", {"status": 401}),
        ("POST .*/preupload/", {"status": 403}),
        ("POST .*/info/lfs/objects/batch", {"status": 413}),
        ("PUT ", {"drop": True, "after_bytes": 1000}),
        ("POST .*/commit/", {"status": 503}),
        ("POST .*/commit/", {"delay": 60.0}),
    ],
    ids=["401", "403", "413", "always cut", "always 503", "hangs"],
)
def test_what_stays_is_one_warning_and_a_later_push_completes(
    hub: HubServer, folder: Path, warnings: list, pattern: str, fault: dict
) -> None:
    old = push_run(folder, repo_id=STUDENT).oid
    (folder / "model.safetensors").write_text("better" * 2000)
    pending = hub.fail(pattern, times=1000, **fault)
    started = time.monotonic()
    refused = fault.get("status") in (401, 403, 413)
    push = HubPush(folder, STUDENT, timeout=8.0 if refused else 3.0)
    assert pushed(push) is None
    assert time.monotonic() - started < 20
    assert len(warnings) == 1 and push.command in warnings[0]
    assert push.command.startswith(f"hf-detrkd push {folder} --hub_model_id {STUDENT}")
    assert hub.repos[STUDENT].head == old
    assert (folder / "model.safetensors").read_text() == "better" * 2000 and not leftovers(folder)
    pending.times = 0
    assert push_run(folder, repo_id=STUDENT).oid == hub.repos[STUDENT].head != old
    assert hub.repos[STUDENT].files()["model.safetensors"] == b"better" * 2000


def test_a_hub_that_is_down_is_a_warning_and_a_later_push_completes(
    hub: HubServer, folder: Path, warnings: list
) -> None:
    hub.stop()
    push = HubPush(folder, STUDENT, timeout=2.0)
    assert not push.check()
    assert len(warnings) == 1 and "cannot be reached" in warnings[0]
    assert pushed(push) is None and len(warnings) == 2
    hub.start()
    assert push_run(folder, repo_id=STUDENT).oid == hub.repos[STUDENT].head


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_refused_before_anything_is_trained(
    hub: HubServer, folder: Path, status: int
) -> None:
    hub.fail("/auth-check/write|/repos/create", status=status, times=10)
    with pytest.raises(ValueError, match=r"push_to_hub needs write access to user/student.*hf auth login"):
        HubPush(folder, STUDENT).check()


@pytest.mark.parametrize("name", ["user/my run", "a--b", "x" * 120, "someone/student"])
def test_a_name_that_the_hub_cannot_take_is_refused_before_anything_is_trained(
    hub: HubServer, folder: Path, name: str
) -> None:
    for make in (True, False):
        with pytest.raises(ValueError, match=r"push_to_hub needs .* change hub_model_id"):
            HubPush(folder, name).check(make)
    assert not hub.repos


def test_to_ask_makes_no_repository(hub: HubServer, folder: Path, warnings: list) -> None:
    assert HubPush(folder, "student").check(make=False) and not hub.repos
    hub.stop()
    assert not HubPush(folder, "student", timeout=2.0).check(make=False)
    hub.start()
    hub.read_only = True
    with pytest.raises(ValueError, match="the token is read-only"):
        HubPush(folder, "student").check(make=False)


def test_a_refusal_of_the_storage_is_told_and_not_repeated(hub: HubServer, folder: Path, warnings: list) -> None:
    hub.fail("PUT ", status=403, times=1000)
    assert pushed(HubPush(folder, STUDENT)) is None
    assert "403" in warnings[0]
    assert sum(method == "PUT" for method, *_ in hub.requests) == 1
