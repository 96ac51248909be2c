"""What is held of models that are not resident."""

from __future__ import annotations

from dataclasses import replace

from server.residency.catalog import Base, Catalog, ServedModel
from tests.server.residency.fakes import in_loop, served


def alike(name: str, other: ServedModel) -> ServedModel:
    """Returns a model that has another's tokenizer."""
    return replace(served(name, None), text=other.text)


def dormant(catalog: Catalog, names: str) -> str:
    """Returns which of these are known."""
    return "".join(name for name in names if catalog.dormant(name) is not None)


@in_loop
async def test_of_evicted_models_with_tokenizers_of_their_own_the_last_are_remembered() -> None:
    catalog = Catalog(max_unused_tokenizers=2)
    for name in "abc":
        catalog.publish(served(name, None))
    catalog.park("b")
    catalog.park("a")
    assert dormant(catalog, "abc") == "ab"
    catalog.park("c")
    assert dormant(catalog, "abc") == "ac"


@in_loop
async def test_evicted_models_that_share_their_tokenizer_are_all_remembered() -> None:
    catalog = Catalog(max_unused_tokenizers=1)
    base = served("a", None)
    catalog.publish(base)
    for name in "bcd":
        catalog.publish(alike(name, base))
        catalog.park(name)
    catalog.publish(served("e", None))
    catalog.park("e")  # takes the one place: that of the others is the resident model's
    assert dormant(catalog, "bcde") == "bcde"
    catalog.park("a")  # and now it is nobody's
    assert dormant(catalog, "abcde") == "abcd"


@in_loop
async def test_a_base_that_was_taken_over_counts_too() -> None:
    catalog = Catalog(max_unused_tokenizers=1)
    base = Base(fingerprint="f", text=served("base", None).text)
    catalog.publish(replace(served("a", None), base=base))
    catalog.park("a")
    assert dormant(catalog, "a") == ""


@in_loop
async def test_whoever_comes_or_goes_now_is_remembered_and_so_is_all_of_a_lost_engine() -> None:
    catalog = Catalog(max_unused_tokenizers=1)
    for name in "abc":
        catalog.publish(served(name, None))
    async with catalog.turn("a"):
        for name in "abc":
            catalog.park(name)
        assert dormant(catalog, "abc") == "ac"
    for name in "bc":
        catalog.publish(served(name, None))
    catalog.clear()
    assert dormant(catalog, "abc") == "abc"
