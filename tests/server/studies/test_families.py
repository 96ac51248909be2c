from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from linker_core.errors import BadCheckpointError, LinkerError
from server.registry.records import ModelRecord, ModelState
from server.studies.families import MIN_VARIANTS, Family, Member, families_of


def model(name: str, position: int, digest: str | None, **changes: Any) -> ModelRecord:
    donor = changes.pop("donor", "base")
    record = ModelRecord(
        name=name,
        source=f"/models/{name}",
        request={},
        state=ModelState.READY,
        position=position,
        created_at=1.0,
        donor=None if donor == name else donor,
        family=donor,
        fingerprint=digest,
        plan={"policy": "budget", "donor_fingerprint": None if donor == name else "b"},
    )
    return replace(record, **changes)


BASE = model("base", 1, "b")
ONE, TWO, THREE = model("one", 2, "1"), model("two", 3, "2"), model("three", 4, "3")


def family(*models: ModelRecord, label: str = "base") -> Family:
    return families_of(models)[label]


def unfit(*models: ModelRecord) -> dict[Member, LinkerError]:
    return {
        Member(name=model.name, fingerprint=str(model.fingerprint)): BadCheckpointError("Cut off.")
        for model in models
    }


def names(found: Family) -> list[str | None]:
    return [member.name for member in found.variants]


def test_base_and_two_variants_are_a_study() -> None:
    found = family(TWO, BASE, ONE)
    assert found.base == Member(name="base", fingerprint="b")
    assert names(found) == ["one", "two"]  # in order of arrival
    assert found.key is not None
    assert found.why_not is None


@pytest.mark.parametrize("variants", [(), (ONE,)])
def test_fewer_are_none_and_it_says_why(variants: tuple[ModelRecord, ...]) -> None:
    found = family(BASE, *variants)
    assert found.key is None
    assert found.why_not is not None
    assert f"needs {MIN_VARIANTS} variants" in found.why_not
    assert found.why_not.endswith(f"{len(variants)}.")


@pytest.mark.parametrize(
    "unusable",
    [
        {"state": ModelState.FAILED},
        {"state": ModelState.ONBOARDING},
        {"fingerprint": None},
        {"plan": None},
        {"plan": {"policy": "delta", "donor_fingerprint": "b"}},
        {"plan": {"policy": "adapter", "donor_fingerprint": "b"}},
    ],
)
def test_what_has_no_checkpoint_to_read_is_left_out(unusable: dict[str, Any]) -> None:
    assert names(family(BASE, ONE, replace(TWO, **unusable), THREE)) == ["one", "three"]


def test_unloaded_models_are_studied_like_resident_ones() -> None:
    assert names(family(BASE, ONE, replace(TWO, state=ModelState.UNLOADED))) == ["one", "two"]


def test_copies_count_once() -> None:
    copy = model("copy", 5, "1")
    found = family(BASE, ONE, TWO, copy)
    assert names(found) == ["one", "two"]
    assert found.same_weights == {"copy": "one"}
    assert family(BASE, ONE, copy).key is None


def test_copy_of_the_base_is_a_variant_that_has_not_moved() -> None:
    assert names(family(BASE, ONE, model("copy", 5, "b"))) == ["one", "copy"]


def test_unfit_variant_is_left_out_and_makes_another_study() -> None:
    found = families_of([BASE, ONE, TWO, THREE], unfit(TWO))["base"]
    assert names(found) == ["one", "three"]
    assert [member.name for member in found.left_out] == ["two"]
    assert found.key == family(BASE, ONE, THREE).key
    assert found.why_not is None


def test_unfit_variants_place_is_taken_by_a_copy_of_it() -> None:
    found = families_of([BASE, ONE, TWO, model("copy", 5, "1")], unfit(ONE))["base"]
    assert names(found) == ["two", "copy"]
    assert found.same_weights == {}


def test_variant_that_was_unfit_with_other_weights_is_not_left_out() -> None:
    found = families_of([BASE, ONE, replace(TWO, fingerprint="22")], unfit(TWO))["base"]
    assert (names(found), found.left_out) == (["one", "two"], {})


def test_too_few_that_can_be_read_are_no_study_and_it_says_so() -> None:
    found = families_of([BASE, ONE, TWO], unfit(TWO))["base"]
    assert found.key is None
    assert found.why_not is not None
    assert "there is 1 that can be read; those left out are tried again" in found.why_not


def test_study_holds_though_one_of_its_models_is_left_out_by_now() -> None:
    study = family(BASE, ONE, TWO).new_study(at=1.0)
    now = families_of([BASE, ONE, TWO, THREE], unfit(TWO))["base"]
    assert now.matches(study)
    assert not now.matches(replace(study, variants={"one": "1", "two": "22"}))


def test_families_are_apart() -> None:
    other = model("other", 5, "o", donor="other")
    found = families_of([BASE, other, ONE, TWO])
    assert list(found) == ["base", "other"]
    assert names(found["other"]) == []


def test_base_of_a_family_that_was_taken_over_is_not_its_donor() -> None:
    heir = replace(ONE, donor=None, family="one")
    others = [replace(m, donor="one", family="one") for m in (TWO, THREE)]
    gone = family(heir, *others, label="one")
    assert gone.base == Member(name=None, fingerprint="b")
    assert names(gone) == ["one", "two", "three"]
    old_donor = replace(BASE, donor="one", family="one")
    stayed = family(heir, *others, old_donor, label="one")
    assert stayed.base == Member(name="base", fingerprint="b")
    assert names(stayed) == ["one", "two", "three"]


@pytest.mark.parametrize("base", [replace(BASE, state=ModelState.FAILED), replace(BASE, plan=None)])
def test_no_study_without_its_base(base: ModelRecord) -> None:
    found = family(base, ONE, TWO)
    assert (found.base, found.key) == (None, None)
    assert found.why_not == "Its base is not onboarded yet."


@pytest.mark.parametrize(
    "models",
    [
        (BASE, ONE, TWO, THREE),
        (BASE, ONE, THREE),
        (BASE, ONE, replace(TWO, fingerprint="22")),
        (BASE, ONE, replace(TWO, name="too")),
        (replace(BASE, fingerprint="bb"), ONE, TWO),
    ],
)
def test_other_models_or_weights_are_another_study(models: tuple[ModelRecord, ...]) -> None:
    assert family(*models).key != family(BASE, ONE, TWO).key


def test_state_and_options_change_no_study() -> None:
    other = replace(TWO, state=ModelState.UNLOADED, pinned=True, alias="x", last_used_at=5.0)
    assert family(BASE, ONE, other).key == family(BASE, ONE, TWO).key


def test_study_holds_while_its_models_have_their_weights() -> None:
    study = family(BASE, ONE, TWO).new_study(at=1.0)
    assert family(BASE, ONE, TWO).matches(study)
    assert family(BASE, ONE, TWO, THREE).matches(study)
    assert not family(BASE, ONE, THREE).matches(study)
    assert not family(BASE, ONE, replace(TWO, fingerprint="22")).matches(study)
    assert not family(replace(BASE, fingerprint="bb"), ONE, TWO).matches(study)
    assert not family(BASE, ONE, TWO).matches(replace(study, variants={}))


def test_study_holds_though_one_of_its_models_is_a_copy_by_now() -> None:
    study = family(BASE, ONE, TWO).new_study(at=1.0)
    earlier = replace(TWO, name="earlier", position=0)
    now = family(BASE, earlier, ONE, TWO, THREE)
    assert now.same_weights == {"two": "earlier"}
    assert now.matches(study)
