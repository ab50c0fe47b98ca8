"""A model cut over processes (FSDP): how it is cut, and how the state of an uncut one gets into it.

`fully_shard` leaves every process with a slice of each parameter and of its optimiser state. Checkpoints keep the
slices (`hjepa.train.shards`); here are the ways between them and the state dicts that an uncut model and optimiser
have, so a run may change between one process, DDP and FSDP when it is resumed. Every function that gathers must be
called by all processes.

Source: torch.distributed.checkpoint.state_dict; the names it gives to optimiser entries are turned into the usual
numbers.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def fsdp_plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin | None:
    """Accelerate's FSDP settings for this model if ACCELERATE_USE_FSDP is true, as `accelerate launch` sets it.

    Each transformer Block is a unit. A block's inputs are left in their precision: the rotation table among them
    must stay float32, and autocast sees to the rest. `prepare` cuts the model by them.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    precision = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    )


def prepare(
    accelerator: Accelerator, model: nn.Module, make_optimizer: Callable[[], torch.optim.Optimizer]
) -> tuple[Any, Any]:
    """Model and optimiser as Accelerate prepares them, or cut over the processes where FSDP is asked for.

    Accelerate would give every unit one policy, and match the optimiser's parameters by address, which all empty
    slices share (theta is one number). So the cut is made here: blocks are gathered in the narrow precision, what
    lies outside them in float32, frequencies above all, and the optimiser is made from the slices. On a CPU, where
    Accelerate has no FSDP, it is the same.

    make_optimizer: builds the optimiser of the model's parameters as they are when it is called.
    """
    plugin = fsdp_plugin(accelerator.mixed_precision)
    if plugin is None or not torch.distributed.is_initialized():
        return accelerator.prepare(model, make_optimizer())
    model.to(accelerator.device)
    policy: Any = plugin.mixed_precision_policy
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        fully_shard(block, mp_policy=policy)
        if policy.param_dtype is not None and accelerator.device.type == "cpu":
            for norm in [module for module in block.modules() if isinstance(module, nn.LayerNorm)]:
                norm.register_forward_pre_hook(_narrow)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False))
    model.forward = accelerator.autocast()(model.forward)
    return model, accelerator.prepare_optimizer(make_optimizer())


def _narrow(norm: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """On a CPU torch has no layer norm of float32 tokens by narrow weights; on a GPU autocast widens the weights."""
    return (inputs[0].to(norm.weight.dtype), *inputs[1:])


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has cut this model."""
    return isinstance(model, FSDPModule)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, uncut, on the CPU of the main process; empty elsewhere."""
    return get_model_state_dict(model, options=WHOLE)  # type: ignore[return-value]


def numbered(named: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state dict with the usual numbers in place of the weights' names."""
    number = {name: i for i, name in enumerate(_names(named["param_groups"]))}
    return {
        "state": {number[name]: values for name, values in named["state"].items()},
        "param_groups": [g | {"params": [number[name] for name in g["params"]]} for g in named["param_groups"]],
    }


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load an uncut state dict, given on every process, into a cut model."""
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))


def load_whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an uncut optimiser state dict, given on every process; its parameter groups must be the optimiser's own."""
    known = {id(p): name for name, p in model.named_parameters()}
    groups = [{"params": [known[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    names = _names(groups)
    named = {
        "state": {names[i]: values for i, values in state["state"].items()},
        "param_groups": [g | own for g, own in zip(state["param_groups"], groups, strict=True)],
    }
    set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))  # type: ignore[arg-type]


def _names(groups: list[dict[str, Any]]) -> list[str]:
    return [name for group in groups for name in group["params"]]
