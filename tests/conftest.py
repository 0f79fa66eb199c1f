"""Options and fixtures for all tests."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--golden', help='file of reference results for tests/golden')


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The comparison with reference results runs where their file is given."""
    return True if collection_path.name == 'golden' and not config.getoption('--golden') else None
