"""Any values, on any machine: that one is slow is no failure; an emulated one tries fewer."""

import os

from hypothesis import HealthCheck, settings

_MANY, _FEWER = 100, 8
_EXAMPLES = _FEWER if "GANGWAY_VM" in os.environ else _MANY

settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=_EXAMPLES
)
settings.load_profile("patient")
