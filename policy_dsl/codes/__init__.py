"""The catalogue of diagnostic codes: severity, message template, and what it means.

A code names the defect, never the cure. `docs/errors.md` is checked against this table.
"""

from __future__ import annotations

from policy_dsl.codes.bundles import BUNDLE_CODES
from policy_dsl.codes.kinds import Code, Severity
from policy_dsl.codes.language import LANGUAGE_CODES
from policy_dsl.codes.planning import PLANNING_CODES
from policy_dsl.codes.sources import SOURCE_CODES
from policy_dsl.codes.statistics import STATISTICS_CODES

__all__ = ["CODES", "Code", "Severity"]

CODES: dict[str, Code] = {
    **LANGUAGE_CODES,
    **SOURCE_CODES,
    **PLANNING_CODES,
    **STATISTICS_CODES,
    **BUNDLE_CODES,
}
