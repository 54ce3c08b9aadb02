"""transformers models: loaded whole, without their experts, or made small. The only file that imports transformers."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch
import transformers
from transformers.cache_utils import LinearAttentionLayer

from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.layers import check_count, moe_layers
from cachemoe.offload.errors import InputError

RESIDENT_EXPERTS = "grouped_mm"
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "tekken.json")  # patterns: a tokenizer has one of these at least
LONGEST_REASON = 300  # characters of what another library says


def load_model(path: str | os.PathLike, dtype: torch.dtype = torch.float32):
    """A language model from a local folder of safetensors, whole, for inference on the CPU.

    Raises:
        InputError: if transformers cannot load it, or a tensor is missing.
    """
    outlined = _on_meta(path, _config(path))
    with outside(f"transformers cannot load {path}"):
        model, loading = type(outlined).from_pretrained(
            path,
            config=outlined.config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_complete names them
            local_files_only=True,
            use_safetensors=True,
            experts_implementation=RESIDENT_EXPERTS,
        )
    _check_complete(path, model, loading)
    return model.eval().requires_grad_(False)


def load_without_experts(checkpoint: Checkpoint, device: torch.device | str = "cpu"):
    """The model of a checkpoint, its experts' parameters on the ``meta`` device, all others read once.

    Its class is the one that ``AutoModelForCausalLM`` takes, else ``AutoModelForImageTextToText``: of a model that sees
    and has no class for text alone, the whole, with the experts of its text part on ``meta``. Nothing of an expert is
    read or allocated: a ``Swap`` has to compute them.

    Raises:
        InputError: if transformers does not know the model or lets nothing else compute its experts, or if a tensor is
            missing.
    """
    return _without_experts(checkpoint, checkpoint.tensors.read, device)


def outline(checkpoint: Checkpoint):
    """As ``load_without_experts``, from the headers alone: every parameter that is not an expert's is one zero, spread.

    It takes next to no time and memory, and raises what ``load_without_experts`` would.
    """
    entries = checkpoint.tensors.entries

    def zero(name: str) -> torch.Tensor:
        return torch.zeros((), dtype=entries[name].dtype, device="cpu").expand(entries[name].shape)

    return _without_experts(checkpoint, zero, "cpu")


def small_model(checkpoint: Checkpoint, dtype: torch.dtype):
    """A random model of a checkpoint's class with its layers, its experts and its K, each width next to nothing.

    What a token takes in it is what a token takes in the checkpoint's model beside reading weights.

    Raises:
        InputError: if transformers makes none of such a config.
    """
    given = _config(checkpoint.path).get_text_config()
    kind = given.model_type
    with outside(f"a small {kind}, on which the cost of its layers is measured, cannot be made"):
        config = type(given).from_dict(_narrow(given.to_dict()))
        if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
            raise InputError(f"transformers has no {kind} for text alone, on which the cost of its layers is measured")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        layers = moe_layers(model)
        check_count(model, layers, checkpoint.shape)
    for layer in layers:  # transformers starts some at zero: all tokens would choose the same experts
        for parameter in layer.router.parameters() if layer.router is not None else ():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter)
    return model.eval().requires_grad_(False)


def _narrow(config: dict) -> dict:
    """A config's fields with small widths; layers, experts and what a token uses stay."""
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    small = {"num_attention_heads": 4, "num_key_value_heads": 4 if kv_heads == heads else 2}
    small |= {"hidden_size": 32, "vocab_size": 256, "qk_head_dim": 32}
    ends = {"intermediate_size": 32, "head_dim": 16, "lora_rank": 32}
    narrow = {}
    for name, value in config.items():
        if name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = None
        elif name in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
            value = _plain_rope(value)
        elif type(value) is int:
            value = small.get(name) or next((ends[end] for end in ends if name.endswith(end)), value)
        narrow[name] = value
    return narrow


def _plain_rope(rope: dict) -> dict:
    """A rotation without scaling, which may have a factor for each dimension of a wider head."""
    if rope and all(isinstance(each, dict) for each in rope.values()):  # by the type of layer
        return {kind: _plain_rope(each) for kind, each in rope.items()}
    kept = {name: each for name, each in rope.items() if name in ("rope_theta", "partial_rotary_factor")}
    return kept | {"rope_type": "default"}


def load_tokenizer(path: Path):
    """The checkpoint's tokenizer; None where it has none.

    Raises:
        InputError: if it has one that transformers cannot load: for want of a library perhaps, or because it is code,
            which cachemoe does not run.
    """
    if not any(found for pattern in TOKENIZER_FILES for found in path.glob(pattern)):
        return None
    with outside(f"transformers cannot load the tokenizer of {path}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        # transformers makes one of any model type, of special tokens alone where the files have no vocabulary.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is missing")
        return tokenizer


def static_cache(model, length: int):
    """A key-value cache of fixed size, for ``DecodeGraph``: room for ``length`` tokens at addresses that stay.

    Layers that see a window of the context keep all of it, too, and leave the window to the mask: transformers' own
    count tokens in a Python number, which stays in a captured graph as it was.

    Raises:
        InputError: for layers of another kind, of which nobody knows whether a graph can hold them.
    """
    cache = transformers.StaticCache(config=model.config, max_cache_len=length)
    for number, layer in enumerate(cache.layers):
        if type(layer) is transformers.StaticSlidingWindowLayer:
            cache.layers[number] = transformers.StaticLayer(length)
        elif type(layer) not in (transformers.StaticLayer, LinearAttentionLayer):
            raise InputError(
                f"{type(model).__name__} has a cache of {type(layer).__name__}, which cachemoe does not capture in a "
                "CUDA graph: let the host drive it"
            )
    return cache


def text_streamer(tokenizer):
    """Prints the prompt and what ``generate`` makes of it, as it comes."""
    return transformers.TextStreamer(tokenizer, skip_special_tokens=True)


@contextmanager
def outside(failed: str) -> Iterator[None]:
    """Around a call of another library: whatever it raises is an ``InputError`` that says what failed, and why.

    It shows no progress bars and no warnings meanwhile: what they would say of a checkpoint, cachemoe says.
    """
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of every kind: damaged files reach far into other libraries
        reason = shorten(str(error), LONGEST_REASON, placeholder=" ...")
        if not reason or not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
            reason = f"{type(error).__name__}: {reason}"
        raise InputError(f"{failed}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _config(path):
    with outside(f"transformers cannot load {path}"):
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _on_meta(path, config) -> transformers.PreTrainedModel:
    """The language model that transformers makes of a config, on the ``meta`` device.

    Its own config is the text part's where its class is one for text alone.
    """
    with outside(f"transformers cannot load {path}"), torch.device("meta"):
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
            if type(config) in auto._model_mapping:
                return auto.from_config(config, trust_remote_code=False)
        # Some are in neither list: the class that wrote the checkpoint, if it is one that generates.
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(named, type) and issubclass(named, transformers.GenerationMixin)):
            raise InputError(f"{path} has a {type(config).__name__}, for which transformers has no language model")
        return named(config)


def _without_experts(checkpoint: Checkpoint, read: Callable[[str], torch.Tensor], device: torch.device | str):
    """The model, its parameters read by name; its experts' on ``meta``."""
    path, entries = checkpoint.path, checkpoint.tensors.entries
    config = _config(path)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # of the experts alone, as Checkpoint has made sure
    sizes = Counter()
    for entry in entries.values():
        sizes[entry.dtype] += entry.bytes if entry.dtype.is_floating_point else 0
    dtype = config.dtype or max(sizes, key=sizes.get)
    outlined = _on_meta(path, config)
    check_count(outlined, moe_layers(outlined), checkpoint.shape)
    dense = {name: read(name) for name in entries if not checkpoint.is_expert(name)}
    with outside(f"transformers cannot load {path}"):
        model, loading = _hollow(type(outlined)).from_pretrained(
            None,
            config=outlined.config,
            state_dict=dense,
            dtype=outlined.config.dtype or dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_complete names them
        )
        model.__class__ = type(outlined)
        model.to(device)
        if (path / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    _check_complete(path, model, loading)
    for layer in moe_layers(model):
        for name, size in layer.experts.__dict__.pop("_hollow").items():
            parameter = torch.nn.Parameter(torch.empty(size, device="meta", dtype=model.dtype), requires_grad=False)
            layer.experts.register_parameter(name, parameter)
    model.name_or_path = model.config.name_or_path = str(path)
    return model.eval().requires_grad_(False)


def _hollow(model_class: type) -> type:
    """The model class, its experts without parameters: none is allocated, none is missed."""

    def __init__(self, config, *arguments, **options):
        model_class.__init__(self, config, *arguments, **options)
        for layer in moe_layers(self):
            experts = layer.experts
            experts._hollow = {name: parameter.shape for name, parameter in experts.named_parameters(recurse=False)}
            for name in experts._hollow:
                delattr(experts, name)
            experts._is_hf_initialized = layer.block._is_hf_initialized = True  # or transformers would fill them

    # transformers reads the source of a class's module to see what it supports.
    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


def _check_complete(path, model, loading: dict) -> None:
    """Whether every parameter came from the checkpoint: transformers fills the others with random numbers and goes on.

    Raises:
        InputError: if not; it tells a checkpoint of another class from one that lacks tensors.
    """
    name = type(model).__name__
    for key, found, expected in sorted(loading["mismatched_keys"]):
        raise InputError(f"{path} has {key} of {tuple(found)}, where a {name} of its config has {tuple(expected)}")
    absent = sorted(loading["missing_keys"])
    written_by = (model.config.architectures or [name])[0]
    if absent and written_by != name and not any(key.startswith(f"{model.base_model_prefix}.") for key in absent):
        raise InputError(
            f"{path} has a {written_by}, which lacks a language model's head, {absent[0]}: cachemoe runs models that "
            "predict the next token"
        )
    if absent:
        raise InputError(f"{path} lacks {len(absent)} of the model's tensors, {absent[0]} first")
