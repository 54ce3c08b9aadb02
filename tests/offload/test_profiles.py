"""Devices as pacing."""

import pytest

from cachemoe.offload.errors import InputError
from cachemoe.offload.profiles import PROFILES, DeviceProfile, profile


@pytest.mark.parametrize("name", PROFILES)
def test_a_missed_byte_costs_what_it_costs_on_the_device(name):
    device, resident = profile(name), 12e9
    assert resident / device.pacing(resident).bytes_per_second == pytest.approx(device.memory / device.link)
    assert device.source


def test_latency_is_slowed_as_bandwidth_is():
    pacing = DeviceProfile(2e9, 50e9, "made up", latency=1e-4).pacing(5e9)
    assert (pacing.bytes_per_second, pacing.latency) == pytest.approx((2e8, 1e-3))


def test_none_is_no_pacing():
    assert profile("none") is None


def test_an_unknown_device_is_refused():
    with pytest.raises(InputError, match="unknown profile 'phone-x': choose among none, phone-ufs"):
        profile("phone-x")
