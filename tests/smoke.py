"""What `pytest -m smoke` runs: within seconds, whether the main things work.

File below tests/ -> its tests, or none for all that are not slow.
"""

from __future__ import annotations

from typing import Final

SMOKE: Final[dict[str, tuple[str, ...]]] = {
    "test_house.py": (),
    "test_docs.py": (),
    "test_readme.py": (),
    "policyc/test_public_names.py": ("test_a_policy_is_planned_built_verified_and_compared",),
    "policyc/cli/test_cli.py": (
        *("test_every_command_explains_itself", "test_wrong_usage_is_code_2_on_stderr"),
        *("test_document", "test_a_saved_plan_is_whole", "test_a_fine_policy", "test_sarif"),
        *("test_the_guard_is_named", "test_the_result_is_on_stdout", "test_a_changed_treatment"),
        *("test_errors_against_the_source", "test_a_source", "test_a_bundle", "test_lists"),
        *("test_there_and_back", "test_schemas_are_schemas"),
    ),
    "policyc/reports/test_plan_text.py": (),
    "policy_dsl/language/test_errors.py": (),
    "policy_dsl/language/test_load.py": ("test_every_bundled_policy_loads_and_has_its_files_name",),
    "policy_dsl/language/test_round_trip.py": ("test_numbers_keep_every_bit",),
    "policy_dsl/planning/test_resolve.py": (),
    "emitters/numerics/test_mlx_golden.py": ("test_affine_bytes",),
    "emitters/numerics/test_gptq_golden.py": ("test_words",),
    "emitters/numerics/test_hfq_golden.py": ("test_bytes[13]",),
    "emitters/numerics/test_mxtq_golden.py": ("test_recorded_cases",),
    "emitters/test_bundled_policies.py": (),
    "emitters/test_older_bundles.py": ("test_they_are_compared_with_plans_of_any_age",),
    "emitters/test_verify.py": ("test_a_fine_bundle_passes_every_check", "test_a_cut_shard"),
}
