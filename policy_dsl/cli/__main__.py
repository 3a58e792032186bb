"""`python -m policy_dsl.cli`: the same as `policyc`."""

from __future__ import annotations

import sys

from policy_dsl.cli import main

sys.exit(main())
