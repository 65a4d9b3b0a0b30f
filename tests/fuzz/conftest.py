"""How long to fuzz: `RUNFS_FUZZ=20` tries twenty times as much as a test run does."""

import os

from hypothesis import HealthCheck, settings

TIMES = float(os.environ.get("RUNFS_FUZZ", "1"))
settings.register_profile(
    "fuzz",
    max_examples=max(1, int(150 * TIMES)),
    deadline=5000,  # milliseconds for one input, however hostile; a machine may be busy
    suppress_health_check=list(HealthCheck),
)
