"""The weights that the optimizer moves, and the model that computes with them.

In bfloat16 a weight of 1 moves by 1/256 or not at all: updates of usual learning rates are lost. So the
optimizer's weights, gradient sums and moments are float32, and bfloat16 is what the model computes in [L-2].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

Precision = Literal["bf16", "float32"]


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

    def load(self, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Take ``tensors`` as ``tensors()`` gave them; return (missing, unexpected) names."""
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        self.model.tie_weights()
        with torch.no_grad():
            for name in self._computing:
                if name in tensors:
                    self.parameters[name].copy_(tensors[name])
        untied = set(missing) - set(getattr(self.model, "all_tied_weights_keys", None) or {})
        return sorted(untied), list(unexpected)

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
