"""Phones as pacing."""

import pytest

from cachemoe.offload.errors import InputError
from cachemoe.offload.profiles import PROFILES, profile


@pytest.mark.parametrize("name", PROFILES)
def test_a_missed_byte_costs_what_it_costs_on_the_phone(name):
    phone, resident = profile(name), 12e9
    assert resident / phone.pacing(resident).bytes_per_second == pytest.approx(phone.dram / phone.flash)
    assert phone.source


def test_an_unknown_phone_is_refused():
    with pytest.raises(InputError, match="unknown profile 'phone-x': choose among phone-ufs"):
        profile("phone-x")
