import pytest


@pytest.fixture(autouse=True)
def small_problems(one_thread):
    """All tests here are small, so one thread is best."""
