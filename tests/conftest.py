"""Options and fixtures for all tests."""

from importlib.metadata import distributions
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from runner_globals import forget_runs

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

# What `make setup` makes by default: the maintained fork of OpenMMLab.
DEFAULT_STACK = bool(list(distributions(name='onedl-mmengine')))
NO_GPU = 'there is no GPU'


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--golden', help='file of reference results for tests/golden')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def no_traces_of_runners():
    yield
    forget_runs()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """On the default stack tests are left out for want of a GPU alone; another skip fails."""
    report = yield
    if report.skipped and DEFAULT_STACK and NO_GPU not in str(report.longrepr):
        report.outcome, report.longrepr = 'failed', f'left out: {report.longrepr}'
    return report


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The comparison with reference results runs where their file is given."""
    return True if collection_path.name == 'golden' and not config.getoption('--golden') else None
