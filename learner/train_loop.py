"""The loop of one learner process: decide, train, commit, publish, evaluate, checkpoint, in this order.

It joins the parts it is handed. Every wait has a deadline, and a failure on one rank ends all of them with
the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from broker_schemas.records.packs import StepClaim
from learner import weights
from learner.checkpoints import TrainerState
from learner.collation import PackedRow
from learner.determinism import seed_step
from learner.filler_rows import with_filler
from learner.milestones import LearnerParts, Milestones
from learner.model_parts import adapt_model, check_part_rates, freeze_parts
from learner.optimization import build_optimizer, learning_rate_at, set_learning_rate
from learner.overlapped_rows import StepRows
from learner.packed_forward import RowLoss
from learner.quarantine import take_out
from learner.settings import LearnerSettings
from learner.sharding import local_part, place_model
from learner.step_costs import peak_flops, peak_memory_bytes, work_of
from learner.step_decision import FilledPacks, decide_step, scheduled_kind
from learner.step_report import RankPart, cost_columns, join_parts, log_row
from learner.step_rows import LoadedRow, RowLoader
from learner.step_surroundings import REALISED_RATIO_STEPS, queue_columns, realised_ratio
from learner.train_step import StepUpdate, run_micro_steps, update_weights
from learner.trained_weights import TrainedWeights

__all__ = ["LearnerOutcome", "LearnerParts", "run_learner"]

FINISHED: Final = "finished"
STOP_REQUESTED: Final = "stop_requested"


@dataclass(frozen=True, kw_only=True)
class LearnerOutcome:
    """How a run ended on every rank: steps done, and ``finished``, ``stop_requested`` or an early stop."""

    optimizer_step: int
    reason: str


def run_learner(parts: LearnerParts, settings: LearnerSettings) -> LearnerOutcome:
    """Train until ``max_steps``, an early stop or a stop request, from the latest checkpoint if there is one.

    All ranks call it. Returns the same outcome on all of them after the last checkpoint is written.
    Raises RunStopped, with the same reason on every rank.
    """
    loop = _Loop(parts, settings)
    try:
        return loop.run()
    except Exception as error:
        stop = parts.ranks.announce_failure(error)
        if stop is error:
            raise
        raise stop from error
    finally:
        loop.close()


class _Loop:
    def __init__(self, parts: LearnerParts, settings: LearnerSettings) -> None:
        self._parts = parts
        self._settings = settings
        self._ranks = parts.ranks
        freeze_parts(parts.model, settings.frozen_parts)
        adapter = None
        if settings.adapter is not None:
            adapter = adapt_model(parts.model, settings.adapter, settings.frozen_parts, seed=settings.seed)
        self._row_loss = RowLoss(parts.model.train())
        if settings.is_checkpointing_activations:
            parts.model.gradient_checkpointing_enable({"use_reentrant": False})
        place_model(self._row_loss, parts.ranks, settings.sharding, settings.precision)
        is_whole = settings.sharding == "none"
        # a sharded model has its float32 weights and casts them layer by layer
        self._trained = TrainedWeights(parts.model, settings.precision if is_whole else "float32", adapter)
        check_part_rates(self._trained.parameters, settings.optimization.part_rates)
        self._optimizer = build_optimizer(self._trained.parameters.items(), settings.optimization)
        self._work, self._peak_flops_per_s = work_of(parts.model), peak_flops(parts.ranks.device)
        self._milestones = Milestones(parts, settings, self._trained, self._optimizer)
        self._state = TrainerState(optimizer_step=0)
        self._rows = RowLoader(
            parts.sources,
            rank=parts.ranks.rank,
            world_size=parts.ranks.world_size,
            row_capacity_tokens=settings.row_capacity_tokens,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
        )

    def run(self) -> LearnerOutcome:
        milestones = self._milestones
        self._state = milestones.resume()
        milestones.publish(self._state)
        reason = None
        while reason is None and self._state.optimizer_step < self._settings.max_steps:
            decision = self._decide(num_taken=0)
            is_stopping = None if decision is None else self._train(decision)
            if is_stopping is None:
                reason = STOP_REQUESTED
                break
            milestones.publish_if_due(self._state)
            self._state, reason = milestones.evaluate_if_due(self._state)
            reason = STOP_REQUESTED if is_stopping and reason is None else reason
            milestones.checkpoint_if_due(self._state)
        milestones.checkpoint(self._state)
        self._ranks.barrier(what="end of the run")
        return LearnerOutcome(optimizer_step=self._state.optimizer_step, reason=reason or FINISHED)

    def close(self) -> None:
        self._rows.close()
        self._milestones.close()

    def _decide(self, *, num_taken: int) -> StepClaim | FilledPacks | None:
        started = self._parts.clock()
        optimizer_step = self._state.optimizer_step
        decision = decide_step(
            optimizer_step=optimizer_step,
            policy_version=weights.policy_version_at(optimizer_step, self._settings.sync_every_steps),
            b_ratio=self._settings.b_ratio,
            ranks=self._ranks,
            broker=self._parts.sources.broker,
            stop=self._parts.stop,
            stall_timeout_s=self._settings.stall_timeout_s,
            clock=self._parts.clock,
            num_taken=None if self._settings.num_rollouts_in_step is None else num_taken,
        )
        self._decided_in_s = self._parts.clock() - started
        return decision

    def _train(self, decision: StepClaim | FilledPacks) -> bool | None:
        """Train one step on all ranks; return whether any of them was asked to stop, None before its claim.

        Packs that filled before the claim are trained first, in the order in which the claim then names them.
        """
        clock, started = self._parts.clock, self._parts.clock()
        decided_in_s = self._decided_in_s
        while True:
            part, claim = self._micro_steps(decision, RankPart(wait_s=decided_in_s))
            if claim is None:
                self._optimizer.zero_grad(set_to_none=True)
                return None
            if not self._is_whole(decision, claim):
                # more or fewer rollouts than a step has: the means were over the wrong number
                self._optimizer.zero_grad(set_to_none=True)
                decision = claim
                continue
            part.busy_s = clock() - started - (part.wait_s - decided_in_s)
            part.peak_memory_bytes = [peak_memory_bytes(self._ranks.device)]
            part.is_stop_requested = self._parts.stop.is_set
            arrived = clock()
            joined = self._join(claim, part)
            peers_s = clock() - arrived
            if not joined.broken:
                break
            self._optimizer.zero_grad(set_to_none=True)
            decision = self._take_out(claim, joined)
        update = self._update(claim.optimizer_step)
        finished = clock()
        joined.wait_s += peers_s
        joined.busy_s += finished - arrived - peers_s
        step_s = finished - started + decided_in_s
        self._commit(claim, joined, update, step_s)
        return joined.is_stop_requested

    def _join(self, claim: StepClaim, part: RankPart) -> RankPart:
        what = f"micro-steps of optimizer step {claim.optimizer_step}"
        return join_parts([RankPart.from_body(b) for b in self._ranks.gather(part.to_body(), what=what)])

    def _take_out(self, claim: StepClaim, joined: RankPart) -> StepClaim:
        return take_out(
            claim,
            joined.broken,
            broker=self._parts.sources.broker,
            is_first=self._ranks.is_first,
            weights=(local_part(parameter) for parameter in self._trained.parameters.values()),
        )

    def _micro_steps(
        self, decision: StepClaim | FilledPacks, part: RankPart
    ) -> tuple[RankPart, StepClaim | None]:
        """Run the micro-steps of a step from its first decision on; return its claim, None for a stop."""
        settings = self._settings
        seed_step(settings.seed, decision.optimizer_step, self._ranks.rank)
        steps = StepRows(
            self._rows,
            self._ranks.rank,
            decide=lambda num: self._decide(num_taken=num),
            then=lambda claim: self._load_ahead(claim.optimizer_step + 1),
        )
        if isinstance(decision, StepClaim):
            num_segments = self._rows.num_segments_in_step(decision)
        else:
            assert settings.num_rollouts_in_step is not None, "only asked for where it is known"
            num_segments = settings.num_rollouts_in_step
        part.sums = run_micro_steps(
            self._row_loss,
            self._in_step_with_all(self._timed_rows(steps.rows_from(decision), part)),
            num_segments_in_step=num_segments,
            loss_settings=settings.loss,
            device=self._ranks.device,
            broken=part.broken if settings.loss.keeps_non_finite else None,
        )
        return part, steps.claim

    def _is_whole(self, decision: StepClaim | FilledPacks, claim: StepClaim) -> bool:
        return isinstance(decision, StepClaim) or claim.num_segments == self._settings.num_rollouts_in_step

    def _timed_rows(self, rows: Iterator[LoadedRow], part: RankPart) -> Iterator[PackedRow]:
        while True:
            started = self._parts.clock()
            loaded = next(rows, None)
            part.wait_s += self._parts.clock() - started
            if loaded is None:
                return
            if loaded.row is None:
                part.broken += loaded.broken
            elif not any(item.reason != "quarantined_loss" for item in part.broken):
                # the step begins again once all rows were looked at: none needs to be computed till then
                part.note_row(loaded)
                yield loaded.row

    def _in_step_with_all(self, rows: Iterator[PackedRow]) -> Iterator[PackedRow]:
        """Yield ``rows``, and where the model is sharded rows without loss until every rank has done its own.

        Layers are gathered inside a forward pass, so all ranks must run
        the same number of them, each with an image.
        """
        if self._settings.sharding == "none":
            yield from rows
            return
        while True:
            row = next(rows, None)
            if not any(self._ranks.gather(row is not None, what="count of the step's rows")):
                return
            yield with_filler(row, self._parts.model, self._parts.sources)

    def _update(self, optimizer_step: int) -> StepUpdate:
        optimization = self._settings.optimization
        set_learning_rate(self._optimizer, learning_rate_at(optimizer_step, optimization))
        return update_weights(
            self._trained, self._optimizer, self._ranks, max_grad_norm=optimization.max_grad_norm
        )

    def _load_ahead(self, optimizer_step: int) -> None:
        if optimizer_step >= self._settings.max_steps:
            return
        is_ground_truth = scheduled_kind(optimizer_step, self._settings.b_ratio) == "A"
        load = self._rows.load_ahead if is_ground_truth else self._rows.fetch_ahead
        load(optimizer_step, weights.policy_version_at(optimizer_step, self._settings.sync_every_steps))

    def _commit(self, claim: StepClaim, joined: RankPart, update: StepUpdate, step_s: float) -> None:
        recent_kinds = (self._state.recent_kinds + claim.kind)[-REALISED_RATIO_STEPS:]
        done = claim.optimizer_step + 1
        num_in_step = self._rows.num_segments_in_step(claim)
        self._state = replace(
            self._state,
            optimizer_step=done,
            policy_version=weights.policy_version_at(done, self._settings.sync_every_steps),
            dataset_position=done * num_in_step if claim.kind == "A" else self._state.dataset_position,
            recent_kinds=recent_kinds,
        )
        time_ms = int(self._parts.wall_clock() * 1000)
        row = log_row(claim, joined, update, step_s=step_s, time_ms=time_ms)
        row |= realised_ratio(recent_kinds) | self._milestones.take_seconds()
        row |= cost_columns(joined, self._work, step_s=step_s, peak_flops_per_s=self._peak_flops_per_s)
        self._parts.metrics.on_step(claim, joined, row)
        if self._ranks.is_first:
            broker = self._parts.sources.broker
            broker.commit_step(optimizer_step=claim.optimizer_step, summary=row)
            row |= queue_columns(broker.queue_status(), claim.kind)
            if self._parts.log is not None:
                self._parts.log.write(row)
            self._parts.on_step(row)
