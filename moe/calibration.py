"""What policies have to know of a model beforehand: one safetensors file, made by ``cachemoe calibrate``.

Of each of L layers: ``ratios`` ``[L, 1001]`` float32, the quantiles, in steps of 0.1 %, of a chosen expert's weight
over the best one's; ``thresholds`` ``[L]`` float32, the selection value above which as many experts lie as the model
chooses on average; ``sensitivities`` ``[L]`` float32, nats lost a token if only the best expert runs, over the mean
square of the others' share; ``removal`` ``[L, E]`` int16, experts in the order in which they can be done without;
``misses`` ``[L, E + 1]`` float32, misses a token of the model's own routing in a cache of so many slots, infinite below
K; ``token_ids`` ``[U]`` int32, that the text has, ascending, and ``by_token`` ``[L, U + 1, E]`` float16, the router's
mean logits for each of them and, last, for all; ``clusters`` ``[3, L, E]`` int16, groups of experts that are alike by
their gates, by their outputs and by who is chosen with whom; ``importance`` ``[L, E]`` float32, what an expert's
rounding to a cheaper level adds to its layer's output, squared, as a share; ``cheap_losses`` ``[9]`` float32, nats
a token that are lost if the least important 0, 1, ... 8 eighths are cheap; ``hobbit`` ``[4]`` int16, weights
of an eviction policy. In the metadata ``model`` (the checkpoint's fingerprint), ``name``,
``k``, ``tokens`` and ``version``.
"""

from dataclasses import dataclass
from math import log1p
from pathlib import Path

import torch

from cachemoe.moe.tensor_file import load_tensors, save_tensors
from cachemoe.offload.errors import InputError

CALIBRATION_VERSION = 2
LIKENESS = ("gate", "output", "routed")  # of clusters
PARTS = 8  # of all experts, in which the loss of a cheaper level is measured
QUANTILES = 1001
DTYPES = {
    "ratios": torch.float32,
    "thresholds": torch.float32,
    "sensitivities": torch.float32,
    "removal": torch.int16,
    "misses": torch.float32,
    "token_ids": torch.int32,
    "by_token": torch.float16,
    "clusters": torch.int16,
    "importance": torch.float32,
    "cheap_losses": torch.float32,
    "hobbit": torch.int16,
}
KINDS = {
    "model": str,
    "name": str,
    "k": int,
    "tokens": int,
    "cheaper": str,
}  # of what the metadata says beside the version


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
        cheaper: format of the cheaper level that was measured.
    """

    ratios: torch.Tensor
    thresholds: torch.Tensor
    sensitivities: torch.Tensor
    removal: torch.Tensor
    misses: torch.Tensor
    token_ids: torch.Tensor
    by_token: torch.Tensor
    clusters: torch.Tensor
    importance: torch.Tensor
    cheap_losses: torch.Tensor
    hobbit: torch.Tensor
    model: str
    name: str
    k: int
    tokens: int
    cheaper: str

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
        shapes += [(known,), (layers, known + 1, experts), (len(LIKENESS), layers, experts), (layers, experts)]
        shapes += [(PARTS + 1,), (4,)]
        if [tuple(tensors[name].shape) for name in DTYPES] != shapes or not 1 <= about["k"] <= experts:
            raise broken
        if any((tensors[name] < 0).any() for name in ("ratios", "sensitivities", "clusters", "importance", "hobbit")):
            raise broken
        if not tensors["hobbit"].any():
            raise broken
        for name in ("ratios", "thresholds", "sensitivities", "by_token", "importance", "cheap_losses"):
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

    def check(self, model: str | None, layers: int, experts: int, top_k: int, cheaper: str | None = None) -> None:
        """Whether it was made of this model.

        Args:
            model: its fingerprint; None where that is not known yet.
            cheaper: format of a cheaper level that a routing asks it about; None for one that does not.

        Raises:
            InputError: if not.
        """
        if model not in (None, self.model) or (*self.removal.shape, self.k) != (layers, experts, top_k):
            raise InputError(
                f"the calibration is of another model, {self.name}, or of weights that it had before: make one of this "
                "model with `cachemoe calibrate`"
            )
        if cheaper not in (None, self.cheaper):
            raise InputError(
                f"the calibration measured {self.cheaper} pages, and these are {cheaper}: make one with "
                f"`cachemoe calibrate --cheaper {cheaper}`"
            )

    def ratio(self, quantile: float) -> torch.Tensor:
        """``[L]`` the quantile of a chosen expert's weight over the best one's."""
        place = quantile * (QUANTILES - 1)
        low, share = int(place), place - int(place)
        high = min(low + 1, QUANTILES - 1)
        return self.ratios[:, low] + share * (self.ratios[:, high] - self.ratios[:, low])

    def bits(self, tolerated: float) -> torch.Tensor:
        """``[L, E]`` int64 levels: 1 of as many least important experts as cost that share of perplexity, else 0.

        Between the counts that were measured the loss is taken to grow evenly.
        """
        losses = self.cheap_losses.double().cummax(0).values
        bound, parts = log1p(tolerated), PARTS
        within = int((losses <= bound).sum()) - 1  # the last of the measured counts that is tolerated
        share = 0.0
        if within >= 0:
            share = within
            if within < parts and losses[within + 1] > losses[within]:
                share += float((bound - losses[within]) / (losses[within + 1] - losses[within]))
        count = int(share / parts * self.importance.numel())
        levels = torch.zeros(self.importance.numel(), dtype=torch.int64)
        levels[self.importance.flatten().argsort(stable=True)[:count]] = 1
        return levels.view_as(self.importance)
