"""What the tests of the inference benchmark share."""

import functools

import pytest

from benchmarks import limits, runner


@pytest.fixture(scope="module")
def one_measurement_of_the_device():
    """Its speed is measured once for all tests; how: tests/benchmarks/test_limits.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "REPEATED", 1)
        patch.setattr(runner, "measure_ceilings", functools.cache(runner.measure_ceilings))
        yield
