"""What a model's ``config.json`` says of its experts."""

from pathlib import Path
from textwrap import shorten

import torch

from cachemoe.kernels.formats import FLOATS, GROUPED, GROUPS, PageFormat
from cachemoe.moe.architectures import ACTIVATIONS, EXPERTS, PLAIN, TOP_K
from cachemoe.offload.errors import InputError
from cachemoe.offload.header import read_json

CONFIG = "config.json"
# Of ``config.json``'s fields those used here; the numbers of experts a token are ``top_k_of``'s to check.
FIELDS = {
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation"), str),
    **dict.fromkeys(("num_hidden_layers", "vocab_size", "max_position_embeddings"), int),
    "quantization_config": dict,
}
LARGEST_NUMBER = 1 << 31  # of tokens, layers, experts


def top_k_of(config: dict) -> int:
    """K, of a model's config.

    Raises:
        InputError: if it says none, or another one for each layer.
    """
    value = next((config[key] for key in TOP_K if config.get(key) is not None), None)
    values = value if isinstance(value, list) else [value]
    if not values or type(value := values[0]) is not int or any(each != value for each in values):
        raise InputError(f"the model's config does not say how many experts every token uses, as {TOP_K[0]}")
    return value


def activation_of(config: dict) -> str:
    """The page format's activation for a model's experts.

    Raises:
        InputError: if cachemoe does not compute it.
    """
    experts = EXPERTS.get(config.get("model_type"), PLAIN)
    name = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    for key, value in experts.constants:
        if config.get(key, value) != value:
            raise InputError(f"the model has {key} = {said(config[key])}, and cachemoe computes with {value} alone")
    if not experts.activation and name not in ACTIVATIONS:
        raise InputError(f"the model's experts have {said(name)}; cachemoe computes {', '.join(ACTIVATIONS)}")
    return experts.activation or ACTIVATIONS[name]


def format_of(
    kind: str | None, group: int | None, config: dict, size: tuple[int, int], dtype: torch.dtype, bias: bool
) -> PageFormat:
    """Layout of one expert's page.

    Args:
        kind: one of ``formats.KINDS``; None: that of ``dtype``, exact.
        group: of int4 and int2; None: the largest that divides H and I.
        config: the model's.
        size: H and I.
        dtype: of the weights.
        bias: whether the experts have biases.

    Raises:
        InputError: if the experts do not fit into it.
    """
    hidden, intermediate = size
    own = next((name for name, each in FLOATS.items() if each == dtype), None)
    if own is None:
        raise InputError(f"the experts are in {dtype}, which cachemoe does not read: it reads {', '.join(FLOATS)}")
    kind = own if kind is None else kind
    if kind in GROUPED and group is None:
        fitting = [g for g in GROUPS if hidden % g == intermediate % g == 0]
        if not fitting:
            raise InputError(
                f"{kind} pages need H and I divisible by {min(GROUPS)}, and these are {hidden} and {intermediate}: "
                "choose int8"
            )
        group = max(fitting)
    experts = EXPERTS.get(config.get("model_type"), PLAIN)
    try:
        return PageFormat(
            kind,
            hidden,
            intermediate,
            group or 0,
            activation=activation_of(config),
            bias=bias,
            interleaved=experts.interleaved,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def read_config(path: Path) -> dict:
    """The fields of ``config.json``, those of its text part among them; what is used here has the type that it must."""
    file = path / CONFIG
    try:
        config = read_json(file)
    except OSError as error:
        raise InputError(f"{path} is no checkpoint folder: its {CONFIG} cannot be read ({error})") from error
    except ValueError as error:
        raise InputError(f"{file} cannot be read as a configuration ({error})") from error
    text = config.get("text_config") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(text, dict | None):
        raise InputError(f"{file} is not a configuration: it, and its text_config, must be objects")
    parts = (config, text or {})  # of a model that sees, too, the part that has the experts
    config = {name: value for part in parts for name, value in part.items() if value is not None}
    for name, kind in FIELDS.items():
        if name not in config:
            continue
        if type(value := config[name]) is not kind:
            raise InputError(f"{file} has {name} = {said(value)}, which is no {kind.__name__}")
        if type(value) is int and not 0 < value < LARGEST_NUMBER:
            raise InputError(f"{file} has {name} = {said(value)}, which cannot be")
    return config


def said(value) -> str:
    """A value of a config, short enough for a sentence."""
    return shorten(repr(value), 80)
