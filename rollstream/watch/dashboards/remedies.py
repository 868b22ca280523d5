"""What to do about each alert, as the rules say it: a list of what fires cannot read their annotations."""

from __future__ import annotations

from typing import Final

REMEDIES: Final = {
    "NoProducer": "Start producers; "
    "read the log of the last one. A steps go on, B steps are skipped or waited for.",
    "QueueEmpty": "More producers, a smaller b_ratio, or a shorter max_new_tokens.",
    "LagAtWindow": "A smaller prefetch_target_packs, or a larger sync_every_steps; else drops follow.",
    "DropsRising": "stale - a smaller prefetch_target_packs or a larger version_window; "
    "overflow - a larger queue_limit.",
    "LearnerWaiting": "See the overview for the stage in front of which things wait; scale that one.",
    "RankMissing": "Read the learner's log for the reason; starting it again resumes from its checkpoint.",
    "NoProgress": "The overview shows who waits on whom; rollstream top does it on a terminal.",
    "BrokerNearBudget": "More matchers if segments wait; "
    "save_every_steps smaller if claims are open; else broker.max_bytes.",
    "BrokerNearMemory": "Raise maxmemory, or lower broker.max_bytes of the runs that share the server.",
    "BrokerDown": "Bring it back; "
    "every role reconnects, and nothing acknowledged is lost with durability always.",
    "ExporterDown": "Start rollstream export again.",
    "SyncFailing": "Do all producers see the folder runs/<name>/policy, and is its disk full?",
    "PolicyBehind": "Restart the producers; "
    "if it stays, the weights they read are not those that are published.",
}
