"""Loaded by vLLM into its workers (``--worker-extension-cls``): loading published weights, safely.

Stands alone: it runs in vLLM's environment, where no package of ours is installed.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

# chosen by --weight-transfer-config; loaded when a worker with it starts
WeightTransferEngineFactory.register_engine("rollstream", "rollstream_vllm_transfer", "GroupReceiver")


class PublishedWeights:
    """Adds methods to a vLLM worker, for ``/collective_rpc``."""

    def load_published_weights(self: Any, weights_path: str) -> str | None:
        """Load a Hugging Face folder in place; return None, or why it was not tried.

        An exception here would end the whole server, so what can be seen beforehand is answered instead.
        """
        if not any(Path(weights_path).glob("*.safetensors")):
            return f"no *.safetensors in {weights_path} as this server sees it"
        if self._weight_update_active:
            # half a transfer, whose learner died: layers left apart would take weights of both for whole
            self.finish_weight_update()
        self.reload_weights(weights_path=weights_path)
        _pack_shared_again(self.model_runner.get_model())
        return None

    def load_coordinate_rows(self: Any, weights_path: str) -> str | None:
        """Put the rows beside an adapter into embedding and head; return None, or why not.

        Each worker takes those of its own share of the vocabulary.
        """
        path = Path(weights_path) / "coordinate_rows.safetensors"
        if not (Path(weights_path) / "adapter_config.json").is_file():
            return f"no adapter in {weights_path} as this server sees it"
        if not path.is_file():
            return None
        tensors = load_file(path)
        ids = tensors.pop("coordinate_ids")
        by_layer = {name.split(".")[-2]: rows for name, rows in tensors.items()}
        model = self.model_runner.get_model()
        for module in model.modules():
            if isinstance(module, VocabParallelEmbedding):
                kind = "lm_head" if isinstance(module, ParallelLMHead) else "embed_tokens"
                rows = by_layer.get(kind)
                if rows is not None:
                    _overwrite_rows(module, ids, rows)
        _pack_shared_again(model)
        return None

    def transfer_group(self: Any) -> str:
        """Return the name of the group that this worker would receive weights from; empty for none."""
        engine = self.weight_transfer_engine
        return "" if engine is None else engine.group_name

    def transfer_problem(self: Any) -> str | None:
        """Return None when the last transfer put all its weights in place, else what went wrong with it."""
        engine = self.weight_transfer_engine
        if engine is None:
            return "no weight transfer, expected --weight-transfer-config"
        problem: str | None = engine.problem
        if problem is None:
            _pack_shared_again(self.model_runner.get_model())
        return problem


def _overwrite_rows(module: Any, ids: Any, rows: Any) -> None:
    share = module.shard_indices
    first, end = share.org_vocab_start_index, share.org_vocab_end_index
    mine = (ids >= first) & (ids < end)
    weight = module.weight.data
    weight[(ids[mine] - first).to(weight.device)] = rows[mine].to(weight.device, weight.dtype)
    if hasattr(module, "cpu_linear"):
        module.quant_method.process_weights_after_loading(module)


def _pack_shared_again(model: Any) -> None:
    """Pack weights again that two layers share, such as embeddings that are the output layer too.

    On CPU each layer computes with a packed copy, and vLLM packs again only the layer that the checkpoint
    names: the other one would go on with the old weights.
    """
    owners: dict[int, list[Any]] = defaultdict(list)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and getattr(weight, "ndim", 0) == 2 and weight.numel() > 0:
            owners[weight.data_ptr()].append(module)
    for modules in owners.values():
        for module in modules if len(modules) > 1 else []:
            if hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)
