from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from server.metrics.families import FAMILIES, Family, Kind
from server.metrics.text import header, series, template

HOSTILE = 'a"} 7\nlinker_engine_up 0\\n%s%d{\r\t\x00 é✓'


@given(value=st.text(st.characters(exclude_categories=["Cs"])))
@example(value=HOSTILE)
@example(value="\\")
@example(value="100%")
def test_label_reads_back_as_it_was(value: str) -> None:
    line = template([series("linker_model_state", {"state": "ready", "model": value})]) % 5
    (family,) = text_string_to_metric_families(line)
    (sample,) = family.samples
    assert sample.labels == {"model": value, "state": "ready"}
    assert (sample.name, sample.value) == ("linker_model_state", 5)


def test_labels_stand_in_alphabetical_order() -> None:
    assert series("x", {"model": "m", "le": "1.0"}) == 'x{le="1.0",model="m"}'
    assert series("x", {}) == "x"


def test_header_says_type_and_help_on_one_line_each() -> None:
    family = Family(name="x", kind=Kind.GAUGE, help="back\\slash\nand line")
    assert header(family) == "# HELP x back\\\\slash\\nand line\n# TYPE x gauge\n"


def test_template_takes_a_number_for_each_series() -> None:
    assert template(["a", "b"]) % (1, 0.25) == "a 1\nb 0.25\n"


def test_headers_read_back_as_the_table_says() -> None:
    for family in FAMILIES.values():
        (found,) = text_string_to_metric_families(header(family))
        assert (found.type, found.documentation) == (family.kind.value, family.help)
