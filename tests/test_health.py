"""Liveness, readiness and the metrics page."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient

from assistant import release
from assistant.admission import Limits
from assistant.canary_watch import CanaryWatch
from assistant.engine.errors import EngineUnavailable, StreamBroken
from assistant.engine.protocol import Health, Queue
from assistant.web.totals import Histogram
from storage import deployments
from storage.failures import record_failure
from storage.records import FailureKind, FinishReason
from web_fixtures import QUESTION, Site, make_site, start_canary


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


def ask(site: Site, path: str = "/v1/chat/completions", **body: Any) -> Any:
    reply = site.client().post(path, json={"messages": QUESTION, **body})
    assert reply.status_code in (200, 201), reply.text
    return reply.json()


def samples(site: Site) -> dict[str, float]:
    """Return the metrics page as a mapping of series to value."""
    reply = site.client("operator").get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in reply.text.splitlines() if not line.startswith("#")]
    return {series: float(value) for series, value in (line.rsplit(" ", 1) for line in lines)}


def test_the_process_is_alive_even_when_the_engine_is_not(site: Site) -> None:
    site.engine.health_now = Health(ready=False, detail="booting")
    reply = site.client(None).get("/healthz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


def test_the_process_is_not_well_when_its_data_does_not_answer(site: Site) -> None:
    site.store.close()
    reply = site.client(None).get("/healthz")
    assert reply.status_code == 503
    assert "closed" in reply.json()["reason"]


def test_ready_names_the_policy_that_answers(site: Site) -> None:
    reply = site.client(None).get("/readyz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ready", "policy": site.engine.base_name})


def test_not_ready_while_the_engine_boots_and_says_why(site: Site) -> None:
    site.engine.health_now = Health(ready=False, detail="loading weights")
    reply = site.client(None).get("/readyz")
    assert reply.status_code == 503
    assert reply.json() == {"status": "not ready", "reason": "engine: loading weights"}


def test_not_ready_until_the_served_policy_is_loaded(site: Site) -> None:
    site.engine.base_name = "policy-base-another"
    reply = site.client(None).get("/readyz")
    assert reply.status_code == 503
    assert "not loaded" in reply.json()["reason"]


def test_ready_when_one_server_has_what_is_served_and_another_cannot_load_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def in_every_server() -> frozenset[str]:
        return frozenset()

    monkeypatch.setattr(site.engine, "loaded", in_every_server)
    assert site.client(None).get("/readyz").status_code == 200


def test_not_ready_when_the_engine_is_closed(site: Site) -> None:
    with TestClient(site.app) as client:  # runs the lifespan, which closes the engine
        assert client.get("/readyz").status_code == 200
    assert site.engine.closed
    assert site.client(None).get("/readyz").status_code == 503


def test_questions_turned_away_are_counted_by_the_limit_that_they_met(site: Site) -> None:
    series = 'kotae_questions_refused_total{{reason="{}"}}'.format
    queue_full, too_many = series("queue_full"), series("too_many_at_once")
    assert (samples(site)[queue_full], samples(site)[too_many]) == (0, 0)  # there before the first refusal
    admission = site.services.chat.admission
    admission.limits = Limits(everybody=2, one_person=1)

    def status() -> int:
        return site.client().post("/v1/chat/completions", json={"messages": QUESTION}).status_code

    with admission.admit(site.people["staff"].id):
        assert status() == 429
        with admission.admit(site.people["other"].id):
            assert [status(), status()] == [503, 503]
    ask(site)  # answered: no refusal
    assert (samples(site)[queue_full], samples(site)[too_many]) == (2, 1)


def test_metrics_are_for_this_machine_and_for_operators(site: Site) -> None:
    local = TestClient(site.app, client=("127.0.0.1", 5000))
    local_v6 = TestClient(site.app, client=("::1", 5000))
    assert local.get("/metrics").status_code == 200
    assert local_v6.get("/metrics").status_code == 200
    assert local.get("/metrics", headers={"X-Forwarded-For": "203.0.113.9"}).status_code == 401
    assert site.client(None).get("/metrics").status_code == 401
    assert site.client("staff").get("/metrics").status_code == 403
    assert site.client("operator").get("/metrics").status_code == 200


def test_turns_are_counted_by_policy_and_end(site: Site) -> None:
    base = site.engine.base_name
    ask(site)
    ask(site, max_tokens=1)
    first = samples(site)
    assert first[f'kotae_turns_total{{policy="{base}",finish_reason="stop"}}'] == 1
    assert first[f'kotae_turns_total{{policy="{base}",finish_reason="length"}}'] == 1
    ask(site)
    again = samples(site)
    assert again[f'kotae_turns_total{{policy="{base}",finish_reason="stop"}}'] == 2
    assert again[f'kotae_answer_seconds_count{{policy="{base}"}}'] == 3
    assert again[f'kotae_first_token_seconds_count{{policy="{base}"}}'] == 3


def test_the_first_burst_of_broken_answers_raises_a_count_that_was_there_before_it(site: Site) -> None:
    base = site.engine.base_name

    def series(policy_id: str, end: str) -> str:
        return f'kotae_turns_total{{policy="{policy_id}",finish_reason="{end}"}}'

    first = samples(site)
    assert [first[series(base, end)] for end in get_args(FinishReason)] == [0, 0, 0, 0]
    site.engine.enqueue([("Hel", StreamBroken("the answer broke off"))] * 30)
    for _ in range(30):
        site.client().post("/v1/chat/completions", json={"messages": QUESTION})
    assert samples(site)[series(base, "error")] == 30
    canary = start_canary(site, share=0.25)
    assert samples(site)[series(canary, "error")] == 0


def test_questions_that_fail_before_the_first_word_are_counted_though_they_leave_no_turn(site: Site) -> None:
    base = site.engine.base_name

    def series(kind: str) -> str:
        return f'kotae_failures_total{{policy="{base}",kind="{kind}"}}'

    first = samples(site)
    assert [first[series(kind)] for kind in get_args(FailureKind)] == [0, 0, 0]  # before the first failure
    site.engine.enqueue([EngineUnavailable("engine: answered 500")] * 5)
    for _ in range(5):
        assert site.client().post("/v1/chat/completions", json={"messages": QUESTION}).status_code == 503
    again = samples(site)
    assert (again[series("error")], again["kotae_engine_up"]) == (5, 1)
    assert {count for name, count in again.items() if name.startswith("kotae_turns_total")} == {0}
    record_failure(site.store, policy_id=base, kind="engine_died")
    assert [samples(site)[series(kind)] for kind in get_args(FailureKind)] == [5, 0, 1]


def test_ratings_and_comparisons_are_counted(site: Site) -> None:
    base, client = site.engine.base_name, site.client()
    sides = ask(site, "/api/pairs")
    turns = {"left_turn_id": sides["left"]["turn_id"], "right_turn_id": sides["right"]["turn_id"]}
    client.post("/api/comparisons", json={**turns, "choice": "left"})
    for verdict in ("down", "retracted"):
        client.post("/api/ratings", json={"turn_id": sides["left"]["turn_id"], "verdict": verdict})
    now = samples(site)
    assert now[f'kotae_ratings_total{{policy="{base}",verdict="down"}}'] == 1
    assert now[f'kotae_ratings_total{{policy="{base}",verdict="retracted"}}'] == 1
    # Both answers are of one policy, so it won once and lost once.
    assert now[f'kotae_comparisons_total{{policy="{base}",outcome="win"}}'] == 1
    assert now[f'kotae_comparisons_total{{policy="{base}",outcome="loss"}}'] == 1


def test_the_engine_what_is_served_and_what_is_in_flight_are_told(site: Site) -> None:
    base = site.engine.base_name
    with site.services.release.lease("conversation_1"):
        now = samples(site)
    assert now[f'kotae_in_flight{{policy="{base}"}}'] == 1
    assert now["kotae_engine_up"] == 1
    assert now[f'kotae_served{{policy="{base}",role="stable"}}'] == 1
    site.engine.health_now = Health(ready=False, detail="gone")
    assert samples(site)["kotae_engine_up"] == 0


def test_shares_are_of_the_new_conversations(site: Site) -> None:
    base = site.engine.base_name
    assert samples(site)[f'kotae_served_share{{policy="{base}",role="stable"}}'] == 1
    canary = start_canary(site, share=0.25)
    now = samples(site)
    assert now[f'kotae_served_share{{policy="{base}",role="stable"}}'] == 0.75
    assert now[f'kotae_served_share{{policy="{canary}",role="canary"}}'] == 0.25


def test_the_evidence_about_a_canary_is_told_until_there_is_another(site: Site) -> None:
    assert not [series for series in samples(site) if series.startswith("kotae_canary")]
    canary = start_canary(site, share=0.25)
    CanaryWatch(site.store).look()
    now = samples(site)
    # Nothing has concluded: no evidence either way.
    assert now[f'kotae_canary_e_value{{policy="{canary}"}}'] == 1
    assert now[f'kotae_canary_verdict{{policy="{canary}",status="Inconclusive"}}'] == 1
    for arm in ("canary", "stable"):
        assert now[f'kotae_canary_conversations{{policy="{canary}",arm="{arm}"}}'] == 0
        assert now[f'kotae_canary_negative{{policy="{canary}",arm="{arm}"}}'] == 0
    low, high = (
        now[f'kotae_canary_difference{{policy="{canary}",bound="{bound}"}}'] for bound in ("low", "high")
    )
    assert low < 0 < high
    release.rollback(site.store, actor="system", reason="seen enough")
    asyncio.run(site.services.release.sync())
    assert samples(site)[f'kotae_canary_verdict{{policy="{canary}",status="Inconclusive"}}'] == 1


def test_what_a_server_does_not_tell_is_left_out(site: Site) -> None:
    site.engine.queues_now = [
        Queue(replica="http://one", up=True, running=3, waiting=2),
        Queue(replica="http://two", up=True),
        Queue(replica="http://three", up=False),
    ]
    now = samples(site)
    assert [now[f'kotae_engine_replica_up{{replica="http://{n}"}}'] for n in ("one", "two", "three")] == [
        1,
        1,
        0,
    ]
    assert now['kotae_engine_running{replica="http://one"}'] == 3
    assert now['kotae_engine_waiting{replica="http://one"}'] == 2
    assert len([series for series in now if series.startswith("kotae_engine_running")]) == 1


def test_the_page_is_what_prometheus_reads(site: Site) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    ask(site)
    families = {
        family.name: family
        for family in parser.text_string_to_metric_families(site.client("operator").get("/metrics").text)
    }
    assert families["kotae_turns"].type == "counter"
    assert families["kotae_answer_seconds"].type == "histogram"
    assert families["kotae_engine_up"].samples[0].value == 1


def test_histograms_are_cumulative_and_end_with_everything(site: Site) -> None:
    ask(site)
    buckets = [
        value for series, value in samples(site).items() if series.startswith("kotae_answer_seconds_bucket")
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 1
    assert re.search(r'le="\+Inf"', site.client("operator").get("/metrics").text)


def test_a_value_on_the_edge_of_a_bucket_belongs_to_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1]  # up to 1: 0.5 and 1.0; up to 2: 1.5 and 2.0; above: 9.0
    assert histogram.sum == 14.0


def test_the_served_policy_is_watched_while_the_server_runs(site: Site) -> None:
    before = site.services.release.served
    assert deployments.served(site.store) == before
    with TestClient(site.app) as client:
        assert client.get("/readyz").status_code == 200
