"""`python -m policyc`: the same as `policyc`."""

import sys

from policyc.cli import main

sys.exit(main())
