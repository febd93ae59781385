"""A fixture for deep networks that are cheap."""

import pytest

import numpy_ref.config


@pytest.fixture
def narrow(monkeypatch):
    """Networks of full depth with few channels."""
    monkeypatch.setattr(numpy_ref.config, "STAGE_WIDTHS", (4, 4, 8, 8))
