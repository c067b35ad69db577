"""Settings of hypothesis for slow machines, where an emulated one tries fewer examples; and a network namespace."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from lab.netns import Namespace

_MANY, _FEWER = 100, 8
_EXAMPLES = _FEWER if "GANGWAY_VM" in os.environ else _MANY

settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=_EXAMPLES
)
settings.load_profile("patient")


@pytest.fixture
def own_namespace() -> Iterator[Namespace]:
    """Run the test in an empty network namespace: every port is free there.  Only root may create one."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    with Namespace("unit") as namespace, namespace.entered():
        yield namespace
