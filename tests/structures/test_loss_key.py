"""The names of losses: strings that know their pieces."""

from __future__ import annotations

import pickle

import pytest

from hf_detrkd.structures.loss_key import LossKey


@pytest.mark.parametrize(
    ("pieces", "text", "term", "readable"),
    [
        (("m", "class"), "m_class", "m_class", "m_class"),
        (("m", "class", None, 0), "m_class_0", "m_class", "m_class, layer 0"),
        (("m", "class", "general"), "m_class_general", "m_class_general", "m_class_general"),
        (("m", "class", "general", 11), "m_class_general_11", "m_class_general", "m_class_general, layer 11"),
    ],
)
def test_a_key_is_its_text_and_knows_its_pieces(pieces: tuple, text: str, term: str, readable: str) -> None:
    key = LossKey(*pieces)
    assert key == text and hash(key) == hash(text) and {key: 1}[text] == 1
    assert (key.term, key.readable) == (term, readable)
    assert key.term.layer is None and key.term.group == key.group
    assert key.at(3) == f"{term}_3" and key.at(3).layer == 3


def test_a_key_goes_between_processes() -> None:
    key = pickle.loads(pickle.dumps(LossKey("m", "class", "general", 2)))
    assert (key.method, key.part, key.group, key.layer) == ("m", "class", "general", 2)
