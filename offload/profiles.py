"""Devices whose link is emulated: how fast it is against their memory, from public specifications."""

from dataclasses import dataclass

from cachemoe.offload.errors import InputError
from cachemoe.offload.link import Pacing


@dataclass(frozen=True)
class DeviceProfile:
    """Peak bandwidths of a device: of its fast memory, and of the link over which missing experts come.

    Args:
        link: bytes a second of sequential reads of a phone's flash, or of a PCI Express link in one direction.
        memory: bytes a second of the memory that experts compute from.
        source: where the two come from.
        latency: seconds for each page requested; 0 where the source gives none.
    """

    link: float
    memory: float
    source: str
    latency: float = 0.0

    def pacing(self, resident_bandwidth: float) -> Pacing:
        """The link that makes a missed byte cost, against a resident byte, what it costs on the device.

        Args:
            resident_bandwidth: bytes a second at which this machine computes with resident experts.
        """
        slower = self.memory / resident_bandwidth  # this machine's seconds for one of the device's
        return Pacing(bytes_per_second=self.link / slower, latency=self.latency * slower)


LPDDR5 = "DRAM: LPDDR5 at 6400 MT/s on 64 bits, as in Snapdragon 8 Gen 1 (3200 MHz)."
LPDDR5X = "DRAM: LPDDR5X at 9600 MT/s on 64 bits, as in Snapdragon 8 Gen 3 (4800 MHz)."
PCIE = "PCI-SIG: 16 lanes of {} GT/s, 128b/130b coded, one direction. "

PROFILES = {
    "phone-ufs3.1": DeviceProfile(
        2.1e9, 51.2e9, f"UFS 3.1: Samsung eUFS 3.1, sequential read 2,100 MB/s (March 2020). {LPDDR5}"
    ),
    "phone-ufs4.0": DeviceProfile(4.2e9, 76.8e9, f"UFS 4.0: Samsung, sequential read 4,200 MB/s (May 2022). {LPDDR5X}"),
    "pcie3": DeviceProfile(15.75e9, 900e9, PCIE.format(8) + "Memory: V100 SXM2, 900 GB/s (NVIDIA's data sheet)."),
    "pcie4": DeviceProfile(31.5e9, 1008e9, PCIE.format(16) + "Memory: RTX 4090, 1008 GB/s (NVIDIA's specification)."),
    "pcie5": DeviceProfile(63.0e9, 3350e9, PCIE.format(32) + "Memory: H100 SXM, 3.35 TB/s (NVIDIA's data sheet)."),
}


def profile(name: str) -> DeviceProfile | None:
    """The profile of that name; None for ``none``, the machine's own speed.

    Raises:
        InputError: if there is none.
    """
    if name == "none":
        return None
    if name not in PROFILES:
        raise InputError(f"unknown profile {name!r}: choose among none, {', '.join(PROFILES)}")
    return PROFILES[name]
