"""The rows of one rank and step, where packs are trained while the rest of their step is generated [S-8]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from broker_schemas.errors import DataError
from broker_schemas.records.packs import ReadyPack, StepClaim
from learner.step_decision import FilledPacks
from learner.step_rows import LoadedRow, RowLoader


class StepRows:
    """Follows the decisions of a step to its claim; ``claim`` is None until then, and after a stop.

    ``decide`` takes the number of packs that each rank has taken, and answers on all ranks alike. ``then``
    is called with the claim when its last row is loaded.
    """

    def __init__(
        self,
        rows: RowLoader,
        rank: int,
        decide: Callable[[int], StepClaim | FilledPacks | None],
        then: Callable[[StepClaim], None],
    ) -> None:
        self._rows = rows
        self._rank = rank
        self._decide = decide
        self._then = then
        self.claim: StepClaim | None = None

    def rows_from(self, decision: StepClaim | FilledPacks | None) -> Iterator[LoadedRow]:
        """Yield the rows in micro-step order, each as soon as it is ready.

        Raises DataError where the claim does not begin with the packs that were trained before it.
        """
        taken: list[ReadyPack] = []
        while isinstance(decision, FilledPacks):
            pack, step, version = decision.packs[self._rank], decision.optimizer_step, decision.policy_version
            fetch_next = partial(self._rows.fetch_ahead, step, version, num_taken=len(taken) + 1)
            yield from self._rows.rows_of_packs([pack], step, version, then=fetch_next)
            taken.append(pack)
            decision = self._decide(len(taken))
        if decision is None:
            return
        if taken and list(decision.packs[self._rank][: len(taken)]) != taken:
            raise DataError(
                f"optimizer step {decision.optimizer_step}: rank {self._rank} trained packs "
                f"{[pack.pack_id for pack in taken]} before its claim, which names "
                f"{[pack.pack_id for pack in decision.packs[self._rank]]}; start again"
            )
        self.claim = decision
        then = partial(self._then, decision)
        yield from self._rows.rows_of(decision, num_taken=len(taken), then=then)
