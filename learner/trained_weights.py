"""The weights that the optimizer moves, and the model that computes with them.

In bfloat16 a weight of 1 moves by 1/256 or not at all: updates of usual learning rates are lost. So the
optimizer's weights, gradient sums and moments are float32, and bfloat16 is what the model computes in [L-2].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from learner.sharding import Precision, is_sharded, local_part, take_whole, whole


class TrainedWeights:
    """``model`` computes; ``parameters`` by name, float32 under ``bf16``, are what an optimizer gets.

    Under ``float32`` both are the same tensors. Under ``bf16`` the model is turned into bfloat16 in place;
    its gradients are moved into those of ``parameters`` as soon as they are there and add up in float32.
    Frozen weights have no float32 copy.
    """

    def __init__(self, model: Any, precision: Precision = "float32") -> None:
        self.model = model
        self.precision = precision
        self._computing: dict[str, Parameter] = {}
        if precision == "float32":
            self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
            return
        self.parameters = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._split(name, parameter)
            parameter.data = parameter.data.to(torch.bfloat16)

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds only a part of the weights."""
        return any(is_sharded(parameter) for parameter in self.parameters.values())

    def after_update(self) -> None:
        """Bring what the optimizer moved into the model that computes."""
        with torch.no_grad():
            for name, parameter in self._computing.items():
                parameter.copy_(self.parameters[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return every weight under the names of the model's state, trained ones as the optimizer holds them;
        tied names share one tensor.
        """
        found: dict[str, Tensor] = dict(self.model.state_dict())
        for name, parameter in self._aliases():
            if name in found and parameter in self.parameters:
                found[name] = self.parameters[parameter].detach()
        return found

    def whole_tensors(self, *, keep: bool) -> dict[str, Tensor]:
        """Return copies of ``tensors()`` on the CPU, put together from all ranks; empty without ``keep``.

        Where the model is sharded, every rank must call it.
        """
        copies: dict[int, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, tensor in self.tensors().items():
            # tied names stay one tensor
            place = local_part(tensor).data_ptr()
            if place not in copies:
                gathered = whole(tensor.detach())
                copies[place] = gathered.cpu().clone() if keep else gathered.new_empty(0)
            found[name] = copies[place]
        return found if keep else {}

    def load(self, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Take ``tensors`` as ``whole_tensors()`` gave them; return (missing, unexpected) names."""
        own = dict(self.model.state_dict())
        with torch.no_grad():
            for name in own.keys() & tensors.keys():
                take_whole(own[name], tensors[name])
                if name in self._computing:
                    take_whole(self.parameters[name], tensors[name])
        untied = own.keys() - tensors.keys() - set(getattr(self.model, "all_tied_weights_keys", None) or {})
        return sorted(untied), sorted(tensors.keys() - own.keys())

    def _split(self, name: str, parameter: Parameter) -> None:
        exact = Parameter(parameter.data.to(torch.float32))
        self.parameters[name], self._computing[name] = exact, parameter

        def move_gradient(computing: Tensor) -> None:
            gradient, computing.grad = computing.grad, None
            if gradient is None:
                return
            if exact.grad is None:
                exact.grad = gradient.to(torch.float32)
            else:
                exact.grad += gradient

        parameter.register_post_accumulate_grad_hook(move_gradient)  # type: ignore[no-untyped-call]

    def _aliases(self) -> Iterator[tuple[str, str]]:
        """Yield (name, name of the parameter behind it), more than one name where weights are tied."""
        first = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            yield name, first[id(parameter)]


def unsharded_copy(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """Return a model of the kind of ``model`` with the weights ``tensors`` in ``dtype``, on the CPU."""
    from transformers import AutoModelForImageTextToText

    copy = AutoModelForImageTextToText.from_config(model.config, dtype=dtype)
    TrainedWeights(copy).load(tensors)
    return copy.eval()
