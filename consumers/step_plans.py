"""Plans the packs of one on-policy optimizer step. Pure: lengths in, indices a rank and micro-step out."""

from __future__ import annotations

from collections.abc import Sequence

from consumers.packing import PackingError, SelectionMethod, select_pack
from consumers.step_scope import pack_step
from consumers.window import schedule_window

# rank -> its packs in micro-step order -> indices into the lengths given, rising
StepPlan = list[list[list[int]]]
PackList = list[list[int]]


def plan_window(lengths: Sequence[int], capacity: int, *, num_micro_steps: int, num_ranks: int) -> StepPlan:
    """Return exactly ``num_micro_steps`` packs for each rank, holding every segment; no carry [P-6].

    ``lengths`` are tokens in request order. Raises InfeasibleWindow with advice.
    """
    packs = schedule_window(lengths, capacity, num_micro_steps * num_ranks)
    return [packs[rank::num_ranks] for rank in range(num_ranks)]


def plan_step_budget(lengths: Sequence[int], capacity: int, *, num_ranks: int) -> StepPlan:
    """Return all segments in as many packs as they need, dealt to the ranks [S-7]."""
    return pack_step(lengths, capacity, num_ranks)


def plan_micro(
    carried: Sequence[int],
    lengths: Sequence[int],
    capacity: int,
    *,
    num_micro_steps: int,
    num_ranks: int,
    packing_buffer: int,
    method: SelectionMethod = "exact",
) -> StepPlan:
    """Return one pack for each rank and micro-step, chosen from what that rank holds by then.

    Indices count ``carried`` first (tokens, oldest first, dealt to the ranks in turn), then ``lengths``
    (request order): micro-step m gives rank r its next contiguous slice. What no pack takes is carried.
    Raises PackingError for a step that does not divide, or when a rank would hold more than
    ``packing_buffer`` segments.
    """
    num_slices = num_micro_steps * num_ranks
    if not lengths or len(lengths) % num_slices:
        raise PackingError(
            f"step of {len(lengths)} segments: expected a multiple of {num_slices} "
            f"({num_micro_steps} micro-steps x {num_ranks} ranks), at least one each; "
            "change training.effective_batch_size"
        )
    all_lengths = [*carried, *lengths]
    slice_size = len(lengths) // num_slices
    held = [list(range(rank, len(carried), num_ranks)) for rank in range(num_ranks)]
    plan: StepPlan = [[] for _ in range(num_ranks)]
    for micro_step in range(num_micro_steps):
        for rank in range(num_ranks):
            start = len(carried) + (micro_step * num_ranks + rank) * slice_size
            mine = held[rank] + list(range(start, start + slice_size))
            if len(mine) > packing_buffer:
                raise PackingError(
                    f"rank {rank}: got {len(mine)} segments to hold, expected at most {packing_buffer}; "
                    "raise training.packing_buffer or training.global_max_length"
                )
            chosen = select_pack([all_lengths[index] for index in mine], capacity, method)
            plan[rank].append([mine[place] for place in chosen])
            taken = set(chosen)
            held[rank] = [index for place, index in enumerate(mine) if place not in taken]
    return plan


TARGET_FILL = 0.9
LOOKAHEAD_PACKS = 1.5


def filled_packs(lengths: Sequence[int], capacity: int, method: SelectionMethod = "exact") -> PackList:
    """Return the packs that fill while a step's rollouts still arrive, as rising indices into ``lengths``.

    ``lengths`` (tokens) are in order of arrival. A pack leaves when it is filled to `TARGET_FILL`, or when
    `LOOKAHEAD_PACKS` packs' worth wait; what comes later changes no pack that left. Empty for no lengths.
    """
    packs: PackList = []
    held: list[int] = []
    for index in range(len(lengths)):
        held.append(index)
        while sum(lengths[i] for i in held) >= TARGET_FILL * capacity:
            chosen = select_pack([lengths[i] for i in held], capacity, method)
            num_held = sum(lengths[i] for i in held)
            fill = sum(lengths[held[place]] for place in chosen) / capacity
            if fill < TARGET_FILL and num_held < LOOKAHEAD_PACKS * capacity:
                break
            packs.append([held[place] for place in chosen])
            taken = set(packs[-1])
            held = [i for i in held if i not in taken]
    return packs
