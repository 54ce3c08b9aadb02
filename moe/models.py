"""transformers models: loaded whole or without their experts. The only file that imports transformers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.layers import is_experts
from cachemoe.offload.errors import InputError

RESIDENT_EXPERTS = "grouped_mm"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_model(path: str | os.PathLike, dtype: torch.dtype = torch.float32):
    """A causal language model from a local folder of safetensors, whole, for inference on the CPU.

    Raises:
        InputError: if transformers cannot load it, or a tensor is missing.
    """
    with _readable_errors(path):
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            experts_implementation=RESIDENT_EXPERTS,
        )
    _check_complete(path, loading)
    return model.eval().requires_grad_(False)


def load_without_experts(checkpoint: Checkpoint, device: torch.device | str = "cpu"):
    """The model of a checkpoint, its experts' parameters on the ``meta`` device, all others read once.

    Nothing of an expert is read or allocated: a ``Swap`` has to compute them.

    Raises:
        InputError: if transformers does not know the model or lets nothing else compute its experts, or if a tensor is
            missing.
    """
    with _readable_errors(checkpoint.path):
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # of the experts alone, as Checkpoint has made sure
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if model_class is None:
            raise InputError(f"transformers has no causal language model for {type(config).__name__}")
        tensors = checkpoint.tensors
        dense = {name: tensors.read(name) for name in tensors.entries if not checkpoint.is_expert(name)}
        model, loading = _hollow(model_class).from_pretrained(
            None, config=config, state_dict=dense, dtype="auto", output_loading_info=True
        )
        model.__class__ = model_class
        model.to(device)
        if (checkpoint.path / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                checkpoint.path, local_files_only=True
            )
    _check_complete(checkpoint.path, loading)
    for experts in _experts_of(model):
        for name, shape in experts.__dict__.pop("_hollow").items():
            parameter = torch.nn.Parameter(torch.empty(shape, device="meta", dtype=model.dtype), requires_grad=False)
            experts.register_parameter(name, parameter)
    model.name_or_path = model.config.name_or_path = str(checkpoint.path)
    return model.eval().requires_grad_(False)


def has_tokenizer(path: Path) -> bool:
    """Whether a checkpoint folder has the files of one."""
    return any((path / name).exists() for name in TOKENIZER_FILES)


def load_tokenizer(path: Path):
    """The checkpoint's tokenizer; None where it has none.

    Raises:
        InputError: if transformers cannot load it.
    """
    if not has_tokenizer(path):
        return None
    with _readable_errors(path):
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def static_cache(model, length: int):
    """A key-value cache of fixed size, for ``DecodeGraph``: room for ``length`` tokens at addresses that stay."""
    return transformers.StaticCache(config=model.config, max_cache_len=length)


def text_streamer(tokenizer):
    """Prints what ``generate`` generates as it comes, without the prompt."""
    return transformers.TextStreamer(tokenizer, skip_prompt=True)


def _experts_of(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if is_experts(module)]


def _hollow(model_class: type) -> type:
    """The model class, its experts without parameters: none is allocated, none is missed."""

    def __init__(self, config, *arguments, **options):
        model_class.__init__(self, config, *arguments, **options)
        for experts in _experts_of(self):
            experts._hollow = {name: parameter.shape for name, parameter in experts.named_parameters()}
            for name in experts._hollow:
                delattr(experts, name)
            experts._is_hf_initialized = True  # or transformers would want to fill what is not there

    # transformers reads the source of a class's module to see what it supports.
    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


@contextmanager
def _readable_errors(path) -> Iterator[None]:
    """What transformers raises, in one sentence; and no progress bars meanwhile."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"transformers cannot load {path}: {reason}") from error
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _check_complete(path, loading: dict) -> None:
    """transformers fills what is missing with random numbers and goes on."""
    if absent := sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"]):
        raise InputError(f"{path} lacks {len(absent)} of the model's tensors, {absent[0]} first: get it again")
