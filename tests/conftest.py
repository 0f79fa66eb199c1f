"""Options and fixtures for all tests."""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Examples of the properties: few and always the same ones here, many in `make stress`.
settings.register_profile('default', derandomize=True, max_examples=20, deadline=None)
settings.register_profile(
    'stress',
    derandomize=False,
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile('default')

# Each takes a minute or more. They come first, so that at the end short ones are left to share out.
LONG_FILES = (
    'test_export.py',
    'test_recipes.py',
    'test_train_processes.py',
    'test_road.py',
    'test_pretrain_command.py',
    'test_interruption.py',
    'test_distributed.py',
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--golden', help='file of reference results for tests/golden')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def no_old_logs():
    """A logger of mmengine keeps the stream that it was made with, which ends with its test."""
    yield
    if (logging := sys.modules.get('mmengine.logging')) is not None:
        logging.MMLogger._instance_dict.clear()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The comparison with reference results runs where their file is given."""
    return True if collection_path.name == 'golden' and not config.getoption('--golden') else None
