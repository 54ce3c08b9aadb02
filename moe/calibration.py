"""What policies have to know of a model beforehand: one safetensors file, made by ``cachemoe calibrate``.

Of each of L layers: ``ratios`` ``[L, 1001]`` float32, the quantiles, in steps of 0.1 %, of a chosen expert's weight
over the best one's; ``thresholds`` ``[L]`` float32, the selection value above which as many experts lie as the model
chooses on average; ``sensitivities`` ``[L]`` float32, nats lost a token if only the best expert runs, over the mean
square of the others' share; ``removal`` ``[L, E]`` int16, experts in the order in which they can be done without;
``misses`` ``[L, E + 1]`` float32, misses a token of the model's own routing in a cache of so many slots, infinite below
K; ``token_ids`` ``[U]`` int32, that the text has, ascending, and ``by_token`` ``[L, U + 1, E]`` float16, the router's
mean logits for each of them and, last, for all. In the metadata ``model`` (the checkpoint's fingerprint), ``name``,
``k``, ``tokens`` and ``version``.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from cachemoe.moe.tensor_file import load_tensors, save_tensors
from cachemoe.offload.errors import InputError

CALIBRATION_VERSION = 1
QUANTILES = 1001
DTYPES = {
    "ratios": torch.float32,
    "thresholds": torch.float32,
    "sensitivities": torch.float32,
    "removal": torch.int16,
    "misses": torch.float32,
    "token_ids": torch.int32,
    "by_token": torch.float16,
}
KINDS = {"model": str, "name": str, "k": int, "tokens": int}  # of what the metadata says beside the version


def missing(what: str) -> InputError:
    """The error that ``what`` cannot be done without a calibration."""
    return InputError(
        f"{what} needs a calibration of the model: make one with `cachemoe calibrate MODEL --out FILE`, and give it as "
        "--calibration FILE, or calibration=FILE in Python"
    )


@dataclass(frozen=True)
class Calibration:
    """See the module.

    Args:
        model: fingerprint of the checkpoint.
        name: of the checkpoint.
        k: experts that the model uses a token.
        tokens: of the text that it was made on.
    """

    ratios: torch.Tensor
    thresholds: torch.Tensor
    sensitivities: torch.Tensor
    removal: torch.Tensor
    misses: torch.Tensor
    token_ids: torch.Tensor
    by_token: torch.Tensor
    model: str
    name: str
    k: int
    tokens: int

    def save(self, path: Path) -> None:
        """Write it; it appears under its name only when complete.

        Raises:
            OSError: if it cannot be written.
        """
        about = {"version": CALIBRATION_VERSION} | {name: getattr(self, name) for name in KINDS}
        save_tensors(path, "calibration", about, {name: getattr(self, name) for name in DTYPES})

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read one.

        Raises:
            InputError: if it is none, damaged, or holds a number that cannot be.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there is no calibration at {path}: `cachemoe calibrate` makes one")
        broken = InputError(f"{path} is not a cachemoe calibration, or damaged: make it again")
        tensors, about = load_tensors(path, "calibration", CALIBRATION_VERSION, KINDS, list(DTYPES))
        if any(tensors[name].dtype != dtype for name, dtype in DTYPES.items()) or tensors["removal"].dim() != 2:
            raise broken
        layers, experts = tensors["removal"].shape
        known = len(tensors["token_ids"].flatten())
        shapes = [(layers, QUANTILES), (layers,), (layers,), (layers, experts), (layers, experts + 1)]
        shapes += [(known,), (layers, known + 1, experts)]
        if [tuple(tensors[name].shape) for name in DTYPES] != shapes or not 1 <= about["k"] <= experts:
            raise broken
        if (tensors["ratios"] < 0).any() or (tensors["sensitivities"] < 0).any():
            raise broken
        for name in ("ratios", "thresholds", "sensitivities", "by_token"):
            if not tensors[name].isfinite().all():
                raise InputError(f"{path} has {name} that are not finite: make it again, on text that the model knows")
        everyone = torch.arange(experts, dtype=torch.int16)
        misses = tensors["misses"]
        can_be = (misses >= 0) & (misses.isfinite() == (torch.arange(experts + 1) >= about["k"]))
        if not (tensors["removal"].sort(1).values == everyone).all() or not can_be.all():
            raise broken
        if known == 0 or not (tensors["token_ids"].diff(prepend=torch.tensor([-1], dtype=torch.int32)) > 0).all():
            raise broken
        return cls(**tensors, **about)

    def check(self, model: str | None, layers: int, experts: int, top_k: int) -> None:
        """Whether it was made of this model.

        Args:
            model: its fingerprint; None where that is not known yet.

        Raises:
            InputError: if not.
        """
        if model not in (None, self.model) or (*self.removal.shape, self.k) != (layers, experts, top_k):
            raise InputError(
                f"the calibration is of another model, {self.name}, or of weights that it had before: make one of this "
                "model with `cachemoe calibrate`"
            )

    def ratio(self, quantile: float) -> torch.Tensor:
        """``[L]`` the quantile of a chosen expert's weight over the best one's."""
        place = quantile * (QUANTILES - 1)
        low, share = int(place), place - int(place)
        high = min(low + 1, QUANTILES - 1)
        return self.ratios[:, low] + share * (self.ratios[:, high] - self.ratios[:, low])
