"""Estimates of times from counts."""

import pytest

from greenmim_mm.benchmark.roofline import Device, Launch, device


def test_roofline_takes_the_slowest_of_three():
    slow = Device('test', peak=100.0, bandwidth=10.0, launch=0.5)
    launches = [
        Launch('arithmetic', '', 400, 1, 1),
        Launch('bytes', '', 0, 10, 20),
        Launch('launch', '', 1, 1, 1),
    ]
    assert slow.seconds(launches, 1.0) == 4 + 3 + 0.5
    assert slow.seconds(launches, 0.5) == 4 + 1.5 + 0.5


def test_devices_by_name():
    assert device('rtx 4090') == device('RTX-4090') == device('RTX4090')
    given = device('h100', peak=600, bandwidth=3, launch=2)
    assert (given.name, given.peak, given.bandwidth) == ('H100', 600e12, 3e12)
    assert given.launch == pytest.approx(2e-6)
    with pytest.raises(ValueError, match='no device is named TPU; there are H100, A100, RTX4090'):
        device('TPU')
