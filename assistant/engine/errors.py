"""What can go wrong between us and an engine; backends' own errors are translated into these.

KotaeError
└── EngineError
    ├── EngineUnavailable   no answer came: it failed, or refused
    │   ├── EngineAbsent    nobody is there to ask
    │   │   └── EngineStarting  not yet: it is being started
    │   └── ReplicaAtFault  one server does other than the rest
    ├── EngineBusy          the queue is full; try again
    ├── PolicyNotLoaded     the engine does not know this policy (it restarted)
    ├── ContextTooLong      the messages do not fit the model
    ├── StreamBroken        the answer ended without saying so
    │   └── WrongPolicy     another policy answered
    └── AdapterRefused      these files must not be served
        ├── OtherBase       they are of another base than the one served
        ├── LoadFailed      the engine failed at them, through their fault or its own
        └── NotProven       the servers that are there fail its probes, and others are away
"""

from __future__ import annotations

from storage.errors import KotaeError


class EngineError(KotaeError):
    """An engine could not do what was asked."""


class EngineUnavailable(EngineError):
    """The engine gave no answer: it failed, refused, or is not there."""


class EngineAbsent(EngineUnavailable):
    """Nobody takes questions at the address, or none for this policy for now: what was asked of it is not its fault."""


class EngineStarting(EngineAbsent):
    """The engine is being started, which takes a while and is no fault."""


class ReplicaAtFault(EngineUnavailable):
    """One of several servers does not take or does not apply what another one does: no fault of the policy."""


class EngineBusy(EngineError):
    """The engine's queue is full; the message says when to try again."""


class PolicyNotLoaded(EngineError):
    """The engine does not know this policy."""

    def __init__(self, policy_id: str) -> None:
        super().__init__(f"policy: {policy_id!r} is not loaded in the engine; it is put back within seconds")
        self.policy_id = policy_id


class ContextTooLong(EngineError):
    """The messages and the answer do not fit the model's context."""

    def __init__(self, tokens: int | None, limit: int | None) -> None:
        asked = f"{tokens} tokens" if tokens is not None else "more tokens than fit"
        most = f"at most {limit}" if limit is not None else "fewer"
        super().__init__(f"messages: got {asked}; shorten them to {most} with the answer")
        self.tokens = tokens
        self.limit = limit


class StreamBroken(EngineError):
    """An answer ended without a finish reason, or is not of the form that it must have."""


class WrongPolicy(StreamBroken):
    """Another policy answered than was asked."""


class AdapterRefused(EngineError):
    """These adapter files must not be served; the message names file, tensor, value and fix."""


class OtherBase(AdapterRefused):
    """Another base is served than these files were trained on: sound files, of which nothing bad is known."""


class LoadFailed(AdapterRefused):
    """An engine that is well did not load these files, and does not say why in a way that could be told apart.

    vLLM answers a bad adapter as it answers its own want of memory, and one that is gone as a volume not mounted yet.
    """


class NotProven(AdapterRefused):
    """Every server that could be asked answers otherwise than it should, and another one is away: either may be at fault."""


PERHAPS_FOR_NOW = (LoadFailed, NotProven)
"""What may be the engine's fault: refused at an approval it leaves no mark, and no policy that has answered is withdrawn."""
LEAVES_NO_MARK = (OtherBase, *PERHAPS_FOR_NOW)
"""Refusals at an approval that do not quarantine the policy."""
NO_POLICYS_FAULT = (ContextTooLong, EngineBusy, EngineAbsent)
"""What speaks against no policy: the question, the load, or an engine that is away."""
