"""One run in an output folder at a time, and files that are whole or not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_detrkd.artifacts.run_folder import RECIPE, RESULTS, check_free, delete_run, read_json, write_recipe
from hf_detrkd.artifacts.run_lock import run_lock
from hf_detrkd.artifacts.whole_files import make_whole, write_json, write_whole


HOLD = """
import sys, time
from hf_detrkd.artifacts.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_folder_is_held_by_one_process_until_it_is_gone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        said = rf"in use by another run \(process {other.pid} on .*\): choose another"
        with pytest.raises(ValueError, match=said), run_lock(tmp_path):
            pass
        with run_lock(tmp_path, holds=False):
            pass
    finally:
        other.kill()  # and its lock with it
        other.wait()
    with run_lock(tmp_path):
        pass


def test_a_process_may_hold_its_folder_twice(tmp_path: Path) -> None:
    with run_lock(tmp_path), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        assert (tmp_path / ".owner").is_file()
    assert not (tmp_path / ".owner").exists()


def test_a_default_that_is_written_out_is_the_same_run(tmp_path: Path) -> None:
    defaults = {"method": "none", "seed": 42}
    for stored, given in ({}, {"method": "none"}), ({"method": "none", "seed": "42"}, {}):
        write_recipe(tmp_path, stored)
        check_free(tmp_path, given, False, defaults)
    with pytest.raises(ValueError, match="its method is none, and here kd_detr"):
        check_free(tmp_path, {"method": "kd_detr"}, False, defaults)


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    check_free(tmp_path, {}, resumes=False)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"holds an unfinished run \(checkpoint-3\): --resume_from_checkpoint true"):
        check_free(tmp_path, {}, resumes=False)
    write_json(tmp_path / RESULTS, {"eval_map": 0.5})
    with pytest.raises(ValueError, match=r"holds a finished run: .* --overwrite_output_dir"):
        check_free(tmp_path, {}, resumes=False)
    check_free(tmp_path, {}, resumes=True)
    write_whole(tmp_path / RECIPE, "max_steps: 3\n")
    delete_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"a": 1})

    def half(new: Path) -> None:
        new.write_text('{"a"')
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        make_whole(file, half)
    assert read_json(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("text", "said"), [("", "is not JSON"), ('{"a"', "is not JSON"), ("[]", "must hold a JSON")])
def test_a_file_that_is_not_whole_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "all_results.json").write_text(text)
    with pytest.raises(ValueError, match=rf"all_results.json {said}.* Delete it"):
        read_json(tmp_path / "all_results.json")
