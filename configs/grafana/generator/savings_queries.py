"""What sharing saves, and what it would save of more variants, in PromQL.

Of every family, D bytes are its donor's, R are held by its V resident variants together, and S are
what separate copies of them would take. A further variant then costs (R - D) / (V - 1) on average,
and would cost (S - D) / (V - 1) as a copy: N variants take D and N - 1 times that, which at N = V
is what is there. Families of one resident variant say nothing about a second one, and are left out.
"""

from __future__ import annotations

from configs.grafana.generator.queries import FAMILY

NUMBERS = (1, 2, 4, 8, 16)  # of variants

_EACH = "by (job, instance, family)"
_UNIQUE = f'linker_model_weight_bytes{{{FAMILY},kind="unique"}}'
_LOGICAL = f'linker_model_weight_bytes{{{FAMILY},kind="logical"}}'
_DONOR = f"max {_EACH} ({_UNIQUE})"  # the one model that holds all of its weights
_OTHERS = f"(sum {_EACH} ({_LOGICAL} > bool 0) - 1 > 0)"  # V - 1
_N = " or ".join(f'label_replace(vector({n}), "N", "{n}", "", "")' for n in NUMBERS)

HELD = f"sum(linker_family_weight_bytes{{{FAMILY}}})"
COPIES = f"sum(family:linker_separate_copies_bytes{{{FAMILY}}})"
SAVED = f"sum(family:linker_saved_bytes{{{FAMILY}}})"
SAVED_RATIO = f"{SAVED} / ({COPIES} > 0)"
RESIDENT = f"sum({_LOGICAL} > bool 0)"
TWINS = f"{HELD} - sum({_UNIQUE})"


def _projected(total: str) -> str:
    each = f"(sum {_EACH} ({total}) - {_DONOR}) / {_OTHERS}"
    first = f"sum({_DONOR} and {_OTHERS})"
    return f"(({_N}) - 1) * on () group_left () sum({each}) + on () group_left () {first}"


PROJECTED = _projected(_UNIQUE)
PROJECTED_COPIES = _projected(_LOGICAL)
PROJECTED_RATIO = f"1 - ({PROJECTED}) / on (N) ({PROJECTED_COPIES})"
