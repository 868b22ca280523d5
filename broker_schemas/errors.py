"""Every error that rollstream raises on purpose.

The first level says what a loop does with it::

    RollstreamError
    ├── RecordError            reject the record, count it, go on
    │   ├── MalformedRecord        bytes that are no record of ours, or content that cannot be
    │   ├── SchemaTooNew           written by a newer rollstream than this one
    │   ├── RecordTooLarge         over the size limit; never decoded
    │   ├── LineDiffers            its line in the log says other than its body
    │   ├── VersionUnknown         made by a policy version that was never published
    │   └── BodyMissing            its bytes are no longer in the broker
    ├── BrokerError            back off and retry
    │   ├── BrokerUnavailable      no connection, timeout, still loading
    │   ├── GroupGone              the broker has forgotten our consumer group, and what it held
    │   ├── BrokerFull             the run's byte budget or the server's memory is used up
    │   └── BrokerRefused          wrong password, missing right, not a Redis we can use: do not retry
    ├── RolloutServerError     fail this attempt of the job; it is tried again later
    │   ├── ServerUnavailable      no connection, or no answer in time
    │   ├── ServerFailed           an error of the server's own, or a reply that cannot be: a retry may help
    │   └── ServerRefused          the server says no: the same request would fail again
    │       └── PromptMismatch         the server saw other prompt tokens than we did
    ├── ConfigError            stop before anything is started
    ├── DataError              stop before training: the data set breaks its format
    └── RunStopped             leave together: a deadline passed or a role gave up
        ├── DeadlinePassed         a wait outlasted its deadline
        ├── PlaceTaken             another process holds the place that this one had: write nothing
        └── NonFiniteLoss          a loss is not a number; names the segment
"""

from __future__ import annotations


class RollstreamError(Exception):
    """Root of the tree above."""


class RecordError(RollstreamError):
    """A record that must be rejected with a reason."""

    reason = "record_error"


class MalformedRecord(RecordError):
    """Bytes or content that no producer of ours would write."""

    reason = "malformed"


class SchemaTooNew(RecordError):
    """A record of a schema version above the one this program knows."""

    reason = "schema_too_new"


class RecordTooLarge(RecordError):
    """A record above the size limit, refused before it is decoded."""

    reason = "too_large"


class BodyMissing(RecordError):
    """A record whose body the broker no longer has."""

    reason = "body_missing"


class LineDiffers(RecordError):
    """A record whose line in the log and whose body contradict each other."""

    reason = "line_differs"


class VersionUnknown(RecordError):
    """A record of a policy version above the current one: it would be fresh for ever."""

    reason = "version_unknown"


class BrokerError(RollstreamError):
    """The broker did not do what was asked; nothing was changed."""


class BrokerUnavailable(BrokerError):
    """The broker cannot be reached or does not answer in time."""


class BrokerFull(BrokerError):
    """The byte budget of the run, or the memory of the server, is used up."""


class GroupGone(BrokerError):
    """The broker has forgotten a consumer group: what it held of the run is lost."""


class BrokerRefused(BrokerError):
    """The broker answers and says no: a retry would not help."""


class RolloutServerError(RollstreamError):
    """A rollout server did not do what was asked."""


class ServerUnavailable(RolloutServerError):
    """The server cannot be reached or does not answer in time."""


class ServerFailed(RolloutServerError):
    """The server failed, or its reply cannot be right; another attempt may do better."""


class ServerRefused(RolloutServerError):
    """The server answers and says no, or its settings do not fit: a retry would not help.

    ``status`` is its HTTP status, 0 where it was not the server that said no.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class PromptMismatch(ServerRefused):
    """The prompt tokens that the server saw are not ours."""


class ConfigError(RollstreamError):
    """A configuration that cannot run; the message lists every problem."""


class DataError(RollstreamError):
    """A data set that breaks its format; the message names file, line and field."""


class RunStopped(RollstreamError):
    """The run cannot go on; every rank leaves with this reason."""


class DeadlinePassed(RunStopped):
    """A wait outlasted its deadline."""


class PlaceTaken(RunStopped):
    """Another process took the place of this one, a role that a run has once; nothing was changed."""


class NonFiniteLoss(RunStopped):
    """A loss is infinite or not a number."""
