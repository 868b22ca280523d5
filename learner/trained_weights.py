"""The weights that the optimizer moves, and the model that computes with them.

In bfloat16 a weight of 1 moves by 1/256 or not at all: updates of usual learning rates are lost. So the
optimizer's weights, gradient sums and moments are float32, and bfloat16 is what the model computes in [L-2].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from broker_schemas.method.adapters import AdapterPlan, add_adapters
from learner.sharding import Precision, is_sharded, take_whole, whole


class TrainedWeights:
    """``model`` computes; ``parameters`` by name, float32 under ``bf16``, are what an optimizer gets.

    Under ``float32`` both are the same tensors. Under ``bf16`` the model is turned into bfloat16 in place;
    its gradients are moved into those of ``parameters`` as soon as they are there and add up in float32.
    Frozen weights have no float32 copy. With ``adapter`` it and the coordinate rows are all that is kept and
    published: the rest is the base.
    """

    def __init__(
        self, model: Any, precision: Precision = "float32", adapter: AdapterPlan | None = None
    ) -> None:
        self.model = model
        self.precision = precision
        self.adapter = adapter
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

    def tensors(self, *, with_base: bool = False) -> dict[str, Tensor]:
        """Return every weight under the names of the model's state, trained ones as the optimizer holds them;
        tied names share one tensor. Of an adapter without its base, unless ``with_base``.
        """
        found: dict[str, Tensor] = dict(self.model.state_dict())
        for name, parameter in self._aliases():
            if name in found and parameter in self.parameters:
                found[name] = self.parameters[parameter].detach()
        kept = found.keys() if with_base else self._kept(found)
        return {name: tensor for name, tensor in found.items() if name in kept}

    def untied_tensors(self) -> dict[str, Tensor]:
        """Return ``tensors()`` with each weight under its first name alone."""
        aliases = {name for name, first in self._aliases() if name != first}
        return {name: tensor for name, tensor in self.tensors().items() if name not in aliases}

    def whole_tensors(self, *, keep: bool, with_base: bool = False) -> dict[str, Tensor]:
        """Return copies of ``tensors()`` on the CPU, put together from all ranks; empty without ``keep``.

        Where the model is sharded, every rank must call it.
        """
        copies: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        owners = dict(self._aliases())
        for name, tensor in self.tensors(with_base=with_base).items():
            # tied names stay one tensor
            owner = owners.get(name, name)
            if owner not in copies:
                gathered = whole(tensor.detach())
                copies[owner] = gathered.cpu().clone() if keep else gathered.new_empty(0)
            found[name] = copies[owner]
        return found if keep else {}

    def load(self, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Take ``tensors`` as ``whole_tensors()`` gave them, with an adapter's base or without it; return
        (missing, unexpected) names.
        """
        own = dict(self.model.state_dict())
        with torch.no_grad():
            for name in own.keys() & tensors.keys():
                take_whole(own[name], tensors[name])
                if name in self._computing:
                    take_whole(self.parameters[name], tensors[name])
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        untied = self._kept(own) - tensors.keys() - tied
        return sorted(untied), sorted(tensors.keys() - own.keys())

    def _kept(self, names: Iterable[str]) -> set[str]:
        """Return which of ``names`` a checkpoint holds."""
        if self.adapter is None:
            return set(names)
        return set(names) & self.parameters.keys()

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


def unsharded_copy(trained: TrainedWeights, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """Return a model of the kind of the trained one with the weights ``tensors`` in ``dtype``, on the CPU."""
    from transformers import AutoModelForImageTextToText

    copy = AutoModelForImageTextToText.from_config(trained.model.config, dtype=dtype)
    if trained.adapter is not None:
        add_adapters(copy, trained.adapter)
    TrainedWeights(copy).load(tensors)
    return copy.eval()
