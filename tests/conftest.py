"""What holds for every test: examples take the time that they take."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A kernel may compile in the first example, and the machine may be busy: neither is a failure.
settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")
