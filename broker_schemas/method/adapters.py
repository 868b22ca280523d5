"""Low-rank adapters by peft on a frozen model, the rows of its coordinate tokens beside them [L-5].

An adapter that was just made changes nothing: it is the base, until it is trained. torch and peft are
imported on first use only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from broker_schemas.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

ROWS_NAME: Final = "coordinate_rows"
ADAPTER: Final = "default"
MAX_SHOWN: Final = 12
_PREFIX: Final = "base_model.model."
_MAGNITUDE: Final = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that an adapter was trained on: its folder, and a digest of its files, empty if unknown."""

    path: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """What is added to a model: an adapter of ``rank`` scaled by ``alpha`` / rank on each of ``layers``, full
    names of linear layers, and rows of their own for ``coordinate_ids`` in embedding and head of ``base``.
    """

    rank: int
    alpha: float
    layers: tuple[str, ...]
    coordinate_ids: tuple[int, ...]
    dropout: float = 0.0
    is_dora: bool = False
    base: BaseModel = BaseModel()


def choose_layers(names: Sequence[str], targets: Sequence[str]) -> tuple[str, ...]:
    """Return which of ``names``, linear layers that are trained, end in one of ``targets``.

    Raises ConfigError for a target that matches none of them.
    """
    missing = [target for target in targets if not any(_ends_in(name, target) for name in names)]
    if missing:
        known = sorted({name.rpartition(".")[2] for name in names})
        shown = ", ".join(known[:MAX_SHOWN]) or "none"
        raise ConfigError(
            f"training.lora.targets: got {', '.join(missing)}, which match no linear layer that is trained, "
            f"expected ends of their names, such as {shown}"
        )
    return tuple(name for name in names if any(_ends_in(name, target) for target in targets))


def linear_layers(model: Any) -> list[str]:
    """Return the names of the linear layers that an adapter may be put on: all but the head."""
    from torch.nn import Linear

    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, Linear) and module is not head
    ]


def add_adapters(model: Any, plan: AdapterPlan, *, seed: int = 0) -> None:
    """Freeze ``model`` and give it, in place, the adapters and rows of ``plan``, all of which are trained.

    What they compute is what the model computed. On the meta device they have no values either. ``seed``
    decides the adapters' random halves. Raises ConfigError where peft is not installed.
    """
    import torch

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if plan.layers:
        peft = _peft()
        config = peft.LoraConfig(
            r=plan.rank,
            lora_alpha=plan.alpha,
            lora_dropout=plan.dropout,
            use_dora=plan.is_dora,
            target_modules=list(plan.layers),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    if plan.coordinate_ids:
        add_coordinate_rows(model, plan.coordinate_ids)


def add_coordinate_rows(model: Any, token_ids: Sequence[int]) -> None:
    """Give embedding and head trained rows of their own for ``token_ids``, begun as the ones they replace.

    Tied embeddings and head share the rows. The weights that held them stay as they are.
    """
    import torch

    ids = sorted(token_ids)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    for module in (embedding, head):
        if module is head and is_tied:
            break
        values = module.weight.detach()[torch.tensor(ids, device=module.weight.device)].clone()
        module.register_parameter(ROWS_NAME, torch.nn.Parameter(values))
    if is_tied:
        head.register_parameter(ROWS_NAME, getattr(embedding, ROWS_NAME))
    swapped = SwappedRows(ids)
    embedding.register_forward_hook(swapped.embed)
    head.register_forward_hook(swapped.score)


def tie_coordinate_rows(model: Any) -> None:
    """Let head and embedding share their rows again after tied weights were put in other memory."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if hasattr(head, ROWS_NAME) and head.weight is embedding.weight:
        setattr(head, ROWS_NAME, getattr(embedding, ROWS_NAME))


def coordinate_ids_of(module: Any) -> tuple[int, ...]:
    """Return the token ids that an embedding or a head has rows of their own for, rising; none for none."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return next((owner.ids for owner in owners if isinstance(owner, SwappedRows)), ())


def is_added(name: str) -> bool:
    """Return whether the weight ``name`` of a model's state is an adapter's, or a row beside it."""
    return name.endswith(ROWS_NAME) or ".lora_" in name


def stored_name(name: str) -> str:
    """Return how peft writes the adapter weight ``name`` of a model's state into its file."""
    bare = name.removesuffix(f".{ADAPTER}.weight")
    return f"{_PREFIX}{bare}" if bare.endswith(_MAGNITUDE) else f"{_PREFIX}{bare}.weight"


def state_name(name: str) -> str:
    """Return the name that the weight ``name`` of a peft file has in a model's state."""
    bare = name.removeprefix(_PREFIX)
    return f"{bare.removesuffix('.weight')}.{ADAPTER}.weight"


class SwappedRows:
    """Forward hooks that take the coordinate tokens ``ids``, rising, from their own rows.

    A lookup table over the vocabulary would be a buffer of the model's, and a weight put together anew would
    cost its memory every time.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = tuple(ids)
        self._on: dict[Any, Tensor] = {}

    def embed(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the embeddings (..., D) of the ids ``args[0]``, those of coordinate tokens from the rows."""
        import torch

        ids = self._ids_on(args[0].device)
        places = torch.searchsorted(ids, args[0]).clamp(max=len(self.ids) - 1)
        is_coordinate = (ids[places] == args[0]).unsqueeze(-1)
        rows = torch.nn.functional.embedding(places, module.coordinate_rows)
        return torch.where(is_coordinate, rows, output)

    def score(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the logits (..., V) of the states ``args[0]``, those of coordinate tokens from the rows."""
        import torch

        scores = torch.nn.functional.linear(args[0], module.coordinate_rows)
        return output.index_copy_(-1, self._ids_on(output.device), scores)

    def _ids_on(self, device: Any) -> Tensor:
        import torch

        if device not in self._on:
            # made outside of inference mode: what is made inside cannot be saved for a backward pass
            with torch.inference_mode(False):
                self._on[device] = torch.tensor(self.ids, device=device)
        return self._on[device]


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _peft() -> Any:
    try:
        import peft
    except ImportError as exc:
        raise ConfigError(
            f"training.lora: peft cannot be imported ({exc}); pip install 'rollstream[train]'"
        ) from exc
    return peft
