"""`python -m policyc`: the same as `policyc`."""

from __future__ import annotations

import sys

from policyc.cli import main

sys.exit(main())
