"""Keys are what they are defined to be, and part what must not be mistaken for each other."""

from __future__ import annotations

import hashlib

import pytest

from linker_core.engine.prefix import PageKeys, key_root


def test_keys_chain_the_digests_of_pages() -> None:
    root = bytes(32)
    first = hashlib.sha256(root + bytes.fromhex("010000000a000000")).digest()
    second = hashlib.sha256(first + bytes.fromhex("00010000ffffff7f")).digest()
    tokens = [1, 10, 256, 2**31 - 1, 5]
    assert PageKeys(root).first(2, tokens, 2) == [first, second]


def test_keys_asked_for_bit_by_bit_are_those_asked_for_at_once() -> None:
    tokens = list(range(40))
    keys = PageKeys(b"r" * 32)
    assert keys.first(3, tokens, 4) == keys.first(10, tokens, 4)[:3]
    assert keys.first(10, tokens, 4) == PageKeys(b"r" * 32).first(10, tokens, 4)
    assert keys.first(0, tokens, 4) == []


def test_keys_differ_from_the_first_other_token_on() -> None:
    root = b"r" * 32
    one = PageKeys(root).first(4, [1] * 16, 4)
    other = PageKeys(root).first(4, [1] * 7 + [2] + [1] * 8, 4)
    assert one[0] == other[0]
    assert not set(one[1:]) & set(other)


def test_keys_without_a_root_are_none() -> None:
    assert PageKeys(None).first(2, [1] * 8, 4) == []


@pytest.mark.parametrize(
    ("plan_fingerprint", "slot", "salt"),
    [("plan", 1, "s"), ("plam", 0, "s"), ("plan", 0, ""), ("plans", 0, ""), ("plan", 256, "s")],
)
def test_key_root_differs_with_plan_slot_and_salt(
    plan_fingerprint: str, slot: int, salt: str
) -> None:
    root = key_root(plan_fingerprint="plan", slot=0, salt="s")
    assert root == key_root(plan_fingerprint="plan", slot=0, salt="s")
    assert len(root) == 32
    assert root != key_root(plan_fingerprint=plan_fingerprint, slot=slot, salt=salt)


def test_key_root_of_any_text_exists() -> None:
    roots = {key_root(plan_fingerprint="p", slot=0, salt=salt) for salt in ("\ud800", "é", "\0")}
    assert len(roots) == 3
