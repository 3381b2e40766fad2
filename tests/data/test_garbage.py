"""The garbage collector is paused only inside."""

from __future__ import annotations

import gc

import pytest

from hf_detrkd.data.garbage import without_garbage_collection


@pytest.fixture(autouse=True)
def enabled():
    gc.enable()
    yield
    gc.enable()


def test_collection_goes_on_afterwards_even_after_an_error():
    with pytest.raises(KeyError), without_garbage_collection():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_a_pause_inside_another_does_not_end_it():
    with without_garbage_collection():
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    with without_garbage_collection():
        pass
    assert not gc.isenabled()
