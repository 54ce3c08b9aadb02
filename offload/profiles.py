"""Phones whose link is emulated: how fast their flash reads against their DRAM, from public specifications."""

from dataclasses import dataclass

from cachemoe.offload.errors import InputError
from cachemoe.offload.link import Pacing


@dataclass(frozen=True)
class DeviceProfile:
    """Peak bandwidths of a phone.

    Args:
        flash: bytes a second of sequential reads.
        dram: bytes a second of its memory bus.
        source: where the two come from.
    """

    flash: float
    dram: float
    source: str

    def pacing(self, resident_bandwidth: float) -> Pacing:
        """The link that makes a missed byte cost, against a resident byte, what it costs on the phone.

        Args:
            resident_bandwidth: bytes a second at which this machine computes with resident experts.
        """
        return Pacing(bytes_per_second=resident_bandwidth * self.flash / self.dram)


PROFILES = {
    "phone-ufs3.1": DeviceProfile(
        flash=2.1e9,
        dram=51.2e9,
        source="UFS 3.1: Samsung eUFS 3.1, sequential read 2,100 MB/s (March 2020). "
        "DRAM: LPDDR5 at 6400 MT/s on 64 bits, as in Snapdragon 8 Gen 1 (3200 MHz).",
    ),
    "phone-ufs4.0": DeviceProfile(
        flash=4.2e9,
        dram=76.8e9,
        source="UFS 4.0: Samsung, sequential read 4,200 MB/s (May 2022). "
        "DRAM: LPDDR5X at 9600 MT/s on 64 bits, as in Snapdragon 8 Gen 3 (4800 MHz).",
    ),
}


def profile(name: str) -> DeviceProfile:
    """The profile of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in PROFILES:
        raise InputError(f"unknown profile {name!r}: choose among {', '.join(PROFILES)}")
    return PROFILES[name]
