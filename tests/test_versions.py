"""The versions of libraries that setup.cfg allows, and those that the tests are run on."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from hf_detrkd.adapters import ADAPTERS
from hf_detrkd.models.compat import FAMILY_SINCE, check_family, is_missing
from hf_detrkd.models.loading import load_config, load_detector
from tests import ROOT


FILE = ROOT / "tests" / "constraints" / "oldest.txt"
OLDEST = dict(re.findall(r"^([\w-]+)==(.+)$", FILE.read_text(), re.MULTILINE))


def test_the_lower_bounds_are_the_versions_that_the_tests_are_run_on() -> None:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    wanted = settings["options"]["install_requires"] + extras["trackers"] + extras["demo"]
    assert dict(re.findall(r"^([\w-]+)>=([\d.]+)", wanted, re.MULTILINE)) == OLDEST


def test_every_family_that_came_later_is_one_of_ours_and_is_there_from_its_version() -> None:
    assert set(FAMILY_SINCE) <= set(ADAPTERS)
    here = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    assert all((family in here) != is_missing(family) for family in ("deimv2", "rf_detr"))


@pytest.mark.parametrize("family", FAMILY_SINCE)
def test_a_family_that_the_installed_transformers_lacks_is_one_sentence(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_detrkd.models.compat.transformers", SimpleNamespace(__version__="5.3.0"))
    sentence = rf"^{family} needs transformers>=5\.\d, but 5.3.0 is installed: upgrade transformers, or choose"
    with pytest.raises(ValueError, match=sentence):
        check_family(family)
    (tmp_path / "config.json").write_text('{"model_type": "' + family + '"}')
    monkeypatch.delitem(transformers.CONFIG_MAPPING._mapping, family, raising=False)
    if family != "dino_detr":  # its own config says it
        for load in (load_detector, load_config):
            with pytest.raises(ValueError, match=sentence):
                load(str(tmp_path))
