"""Errors of a training, beside those of `doublehead.errors`, whose names this module keeps."""

from __future__ import annotations

from doublehead.errors import CheckpointError, UserError, config_errors, shown_to_user

__all__ = [
    "CheckpointError", "NonFiniteLossError", "PeerFailed", "PeerLostError", "PeerStopped", "UserError",
    "config_errors", "shown_to_user",
]  # fmt: skip


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; the message names the step, the losses and the images."""

    exit_code = 1


class PeerLostError(UserError):
    """The connection to another process of this job broke, and no process says why."""

    exit_code = 1


class PeerFailed(SystemExit):
    """Another process of this job failed and says why; this one ends with its exit code and says nothing."""


class PeerStopped(PeerFailed):
    """Another process of this job was asked to stop, and this one stops with it."""
