"""A model whose experts are in a pool: what would read or write their parameters is refused, each in one sentence."""

from types import MethodType

import torch
from torch.autograd import forward_ad

from cachemoe.moe.layers import MoeLayer
from cachemoe.offload.errors import InputError

NO_GRADIENTS = "experts in a pool give no gradients: use the model under torch.no_grad(), and train transformers' own"
# What may be asked of a parameter without its values.
_ATTRIBUTES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "grad", "grad_fn", "requires_grad"),
    *("is_leaf", "is_meta", "is_cpu", "is_cuda", "is_nested", "is_quantized", "is_sparse"),
)
_METHODS = ("size", "dim", "numel", "nelement", "element_size", "stride", "is_contiguous", "is_floating_point")
_OF_NO_VALUE = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    *(torch.Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel),
}


class PooledParameter(torch.nn.Parameter):
    """In the place of experts' weights that are in a pool: their shape and dtype, on the meta device, and no values.

    Whatever would read or write values raises ``InputError``: a meta tensor takes part in silence, so that a merged
    adapter or loaded weights would be lost, and another experts implementation would compute nonsense.
    """

    def __new__(cls, shape: torch.Size, dtype: torch.dtype):
        return super().__new__(cls, torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        sets = torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__
        no_gradient = function in sets and [*args[1:], *(kwargs or {}).values()] == [False]
        if function not in _OF_NO_VALUE and not no_gradient:
            raise InputError(
                "the experts of this model are in cachemoe's pool, and their parameters can neither be read nor "
                "written: change the checkpoint (merge adapters, save it) and load that"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"PooledParameter(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo):
        raise uncopiable()

    def __reduce_ex__(self, protocol):
        raise uncopiable()


def uncopiable() -> InputError:
    """What a copy of a model in a pool raises: memory, threads and the store would be shared, or lost."""
    return InputError("a model whose experts are in a pool cannot be copied or pickled: load it once more instead")


def free(experts: torch.nn.Module) -> None:
    """Let go of a layer's weights: ``PooledParameter`` take their place."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if not isinstance(parameter, PooledParameter):
            experts.register_parameter(name, PooledParameter(parameter.shape, parameter.dtype))


def close_doors(model, layers: list[MoeLayer]) -> None:
    """Refuse, or serve, what a model's own methods would do with its experts' parameters, and those of its parts.

    Args:
        model: of transformers.
        layers: its MoE layers.
    """
    for layer in layers:
        free(layer.experts)
        layer.experts.register_parameter = _refuse_parameter
        layer.experts._apply = MethodType(_apply_to_none, layer.experts)
    pooled = {layer.experts for layer in layers}
    for module in model.modules():
        if module not in pooled and not pooled.isdisjoint(module.modules()):
            module._apply = MethodType(_apply_in_place, module)
            module.register_load_state_dict_pre_hook(_refuse_experts)
            module.__deepcopy__ = module.__reduce_ex__ = _refuse_copies
            if hasattr(module, "save_pretrained"):
                module.save_pretrained = _refuse_to_save


def _apply_to_none(experts, function, recurse=True):
    return experts


def _apply_in_place(module, function, recurse=True):
    """What ``.to()``, ``.float()`` and others come down to: they convert all but the experts, and move nothing."""
    dense = (parameter for parameter in module.parameters() if not isinstance(parameter, PooledParameter))
    if (first := next(dense, None)) is not None:
        before = torch.empty(0, dtype=first.dtype, device=first.device)
        if (device := function(before).device) != before.device:
            raise InputError(
                f"a model whose experts are in a pool on {before.device} cannot move to {device}: load it there, with "
                f"device={str(device)!r}"
            )
    return type(module)._apply(module, function, recurse)


def _refuse_copies(*_):
    raise uncopiable()


def _refuse_parameter(name, parameter):
    """As in an assignment, or by ``load_state_dict(assign=True)``."""
    raise InputError(
        f"the experts of this model are in cachemoe's pool, and {name} cannot be replaced: save the weights as a "
        "checkpoint, and load that"
    )


def _refuse_to_save(*_, **__):
    """Before a folder is made: transformers would find the parameters empty when half of the files are written."""
    raise InputError(
        "a model whose experts are in a pool cannot be saved, since the pool is not a checkpoint: copy the folder "
        "that it was loaded from, or load that with transformers and save it"
    )


def _refuse_experts(module, state_dict, prefix, *_):
    """Before any tensor of a state dict is copied."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, PooledParameter) and prefix + name in state_dict:
            raise InputError(
                f"the experts of this model are in cachemoe's pool, and {name} cannot be loaded into them: save the "
                "weights as a checkpoint, and load that"
            )


def refuse_transforms(*inputs: torch.Tensor) -> None:
    """Refuse what would go through experts in a pool and leave something out in silence.

    Raises:
        InputError: for a trace, which would keep the experts of one input; or a derivative other than by backward,
            which ``NoBackward`` refuses.
    """
    if torch.jit.is_tracing():
        raise InputError("experts in a pool cannot be traced: which are computed differs from input to input")
    wrapped = any(map(torch._C._functorch.is_functorch_wrapped_tensor, inputs))
    if wrapped or (
        forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)
    ):
        raise InputError(NO_GRADIENTS)


class NoBackward(torch.autograd.Function):
    """The output of experts, which have no gradients: a backward pass that reaches it raises."""

    @staticmethod
    def forward(ctx, y, *inputs):
        """``y`` itself, made to depend on ``inputs``."""
        return y.view_as(y)

    @staticmethod
    def backward(ctx, *_):
        raise InputError(NO_GRADIENTS)
