"""The metrics in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from assistant.canary_watch import Judged
from assistant.engine.protocol import Queue
from assistant.shadow_watch import ShadowEvidence
from assistant.web.totals import Histogram, Totals
from storage.records import FailureKind, FinishReason, Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


Gauge = Iterable[tuple[Mapping[str, str], float]]
"""The rows of one gauge: labels and value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """What holds now, beside the totals of what was recorded."""

    in_flight: Mapping[str, int]
    refused: Mapping[str, int]
    """Questions turned away by this process, by reason."""
    served: Served
    engine_up: bool
    queues: Sequence[Queue]
    judged: Judged | None
    """The last verdict on a canary; it stays until there is another."""
    shadow: ShadowEvidence | None
    """The last evidence about a shadow; it stays until there is another."""


def exposition(totals: Totals, present: Present) -> str:
    """Return the metrics page. The database is read here, so call it in a thread."""
    with totals.lock:
        totals.refresh()
        lines = [
            *_counter(
                "kotae_turns",
                "Answers, by policy and how they ended.",
                "finish_reason",
                _from_zero(totals.turns, present.served, FinishReason),
            ),
            *_counter("kotae_ratings", "Thumbs given, by policy and verdict.", "verdict", totals.ratings),
            *_counter("kotae_comparisons", "Answers compared, by outcome.", "outcome", totals.comparisons),
            *_counter(
                "kotae_failures",
                "What went wrong and left no answer, by policy and kind.",
                "kind",
                _from_zero(totals.failures, present.served, FailureKind),
            ),
            *_histogram("kotae_first_token_seconds", "Time to the first token.", totals.first_token_s),
            *_histogram("kotae_answer_seconds", "Time to the whole answer.", totals.total_s),
        ]
    lines += [*_serving(present), *_refused(present.refused), *_engine(present)]
    if present.judged is not None:
        lines += _canary(present.judged)
    if present.shadow is not None:
        lines += _shadow(present.shadow)
    return "\n".join(lines) + "\n"


def _from_zero(counts: Counter[tuple[str, str]], served: Served, kinds: Any) -> Mapping[tuple[str, str], int]:
    """Return every kind from zero on for what may answer, so that `rate()` sees the first one of an outage.

    Args:
        kinds: the `Literal` of the label's values.
    """
    answering = [row.policy_id for row in (served.stable, served.canary) if row is not None]
    return {(policy_id, kind): 0 for policy_id in answering for kind in get_args(kinds)} | counts


def _serving(present: Present) -> Iterator[str]:
    served = present.served
    rows = [("stable", served.stable), ("previous", served.previous), ("canary", served.canary)]
    rows.append(("shadow", served.shadow))
    roles = [({"policy": row.policy_id, "role": role}, row) for role, row in rows if row is not None]
    canary_share = served.canary.share if served.canary else 0.0
    shares = {"stable": 1 - canary_share, "previous": 0.0, "canary": canary_share, "shadow": 0.0}
    in_flight = sorted(present.in_flight.items())
    yield from _gauge(
        "kotae_in_flight", "Answers being made now.", (({"policy": id}, n) for id, n in in_flight)
    )
    yield from _gauge("kotae_served", "Which policy has which role.", ((labels, 1) for labels, _ in roles))
    yield from _gauge(
        "kotae_served_share",
        "Share of the new conversations that a policy gets, 0 to 1.",
        ((labels, shares[labels["role"]]) for labels, _ in roles),
    )


def _refused(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield every reason from zero on, so that `rate()` sees the first question that is turned away."""
    name = "kotae_questions_refused_total"
    yield from _head(name, "Questions turned away since the start, by the limit that they met.", "counter")
    for reason, count in sorted(counts.items()):
        yield f"{name}{_labels(reason=reason)} {count}"


def _engine(present: Present) -> Iterator[str]:
    yield from _gauge("kotae_engine_up", "1 when the engine can answer.", [({}, int(present.engine_up))])
    queues = [({"replica": queue.replica}, queue) for queue in present.queues]
    yield from _gauge(
        "kotae_engine_replica_up",
        "1 when a server of the engine answers.",
        ((labels, int(queue.up)) for labels, queue in queues),
    )
    yield from _gauge(
        "kotae_engine_running",
        "Answers that a server makes now.",
        ((labels, queue.running) for labels, queue in queues if queue.running is not None),
    )
    yield from _gauge(
        "kotae_engine_waiting",
        "Questions that wait in a server.",
        ((labels, queue.waiting) for labels, queue in queues if queue.waiting is not None),
    )


def _canary(judged: Judged) -> Iterator[str]:
    """Yield the numbers of the last verdict; docs/canary.md says what they mean."""
    policy, evidence = {"policy": judged.policy_id}, judged.evidence
    arms = [("canary", evidence.canary, evidence.canary_negative)]
    arms += [("stable", evidence.stable, evidence.stable_negative)]
    bounds = [("low", evidence.difference_low), ("high", evidence.difference_high)]
    for name, help, rows in (
        ("verdict", "The last verdict on a canary.", [({**policy, "status": judged.status}, 1.0)]),
        ("verdict_timestamp_seconds", "When it last changed.", [(policy, judged.at)]),
        (
            "e_value",
            "Evidence that the canary is worse; it is taken back at 100.",
            [(policy, evidence.e_value)],
        ),
        ("conversations", "Concluded ones.", [({**policy, "arm": arm}, float(n)) for arm, n, _ in arms]),
        ("negative", "The negative ones.", [({**policy, "arm": arm}, float(n)) for arm, _, n in arms]),
        (
            "difference",
            "Bounds of the difference of the negative shares, canary minus stable.",
            [({**policy, "bound": bound}, value) for bound, value in bounds],
        ),
    ):
        yield from _gauge(f"kotae_canary_{name}", help, rows)


def _shadow(evidence: ShadowEvidence) -> Iterator[str]:
    """Yield the shadow beside the served policy; docs/canary.md says what the measures mean."""
    policy = {"policy": evidence.policy_id}
    counts = {"answered": evidence.answered, "failed": evidence.failed, "skipped": evidence.skipped}
    yield from _gauge(
        "kotae_shadow_questions",
        "Questions of the shadow's share, by what became of them.",
        (({**policy, "outcome": outcome}, n) for outcome, n in counts.items()),
    )
    yield from _gauge(
        "kotae_shadow_measure",
        "The shadow beside the served policy on the same questions, with 95% bounds.",
        (
            ({**policy, "measure": name, "bound": bound}, number)
            for name, estimate in evidence.measures.items()
            for bound, number in asdict(estimate).items()
            if number is not None
        ),
    )


def _gauge(name: str, help: str, rows: Gauge) -> Iterator[str]:
    yield from _head(name, help, "gauge")
    for labels, value in rows:
        yield f"{name}{_labels(**labels)} {value}"


def _counter(name: str, help: str, label: str, counts: Mapping[tuple[str, str], int]) -> Iterator[str]:
    yield from _head(f"{name}_total", help, "counter")
    for (policy_id, value), count in sorted(counts.items()):
        yield f"{name}_total{_labels(**{'policy': policy_id, label: value})} {count}"


def _histogram(name: str, help: str, histograms: dict[str, Histogram]) -> Iterator[str]:
    yield from _head(name, help, "histogram")
    for policy_id, histogram in sorted(histograms.items()):
        below = 0
        for end, count in zip((*map(str, histogram.ends), "+Inf"), histogram.counts, strict=True):
            below += count
            yield f"{name}_bucket{_labels(policy=policy_id, le=end)} {below}"
        yield f"{name}_sum{_labels(policy=policy_id)} {histogram.sum!r}"
        yield f"{name}_count{_labels(policy=policy_id)} {below}"


def _head(name: str, help: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


def _labels(**labels: str) -> str:
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
