"""The metrics in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from assistant.web.totals import Histogram, Totals

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(
    totals: Totals, *, in_flight: Mapping[str, int], engine_up: bool, served: Mapping[str, str]
) -> str:
    """Return the metrics page; `served` is role to policy.

    The database is read here, so call it in a thread.
    """
    with totals.lock:
        totals.refresh()
        lines = [
            *_counter("kotae_turns", "Answers, by policy and how they ended.", "finish_reason", totals.turns),
            *_counter("kotae_ratings", "Thumbs given, by policy and verdict.", "verdict", totals.ratings),
            *_counter("kotae_comparisons", "Answers compared, by outcome.", "outcome", totals.comparisons),
            *_histogram("kotae_first_token_seconds", "Time to the first token.", totals.first_token_s),
            *_histogram("kotae_answer_seconds", "Time to the whole answer.", totals.total_s),
        ]
    lines += _head("kotae_in_flight", "Answers being made now.", "gauge")
    lines += [f"kotae_in_flight{_labels(policy=id)} {count}" for id, count in sorted(in_flight.items())]
    lines += _head("kotae_served", "Which policy has which role.", "gauge")
    lines += [f"kotae_served{_labels(policy=id, role=role)} 1" for role, id in sorted(served.items())]
    lines += [
        *_head("kotae_engine_up", "1 when the engine can answer.", "gauge"),
        f"kotae_engine_up {int(engine_up)}",
    ]
    return "\n".join(lines) + "\n"


def _counter(name: str, help: str, label: str, counts: Counter[tuple[str, str]]) -> Iterator[str]:
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
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
