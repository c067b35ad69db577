"""The markers of all tests."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes ten seconds or more")
    config.addinivalue_line("markers", "any_kernel: has the same outcome on every kernel; `make test-vm` skips it")
