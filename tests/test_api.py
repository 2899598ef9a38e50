"""Feedback through the API, and what every route has in common: bodies, roles, other sites, headers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assistant.engine.errors import EngineBusy
from assistant.web.limits import API_BODY_BYTES
from storage import feedback, people
from storage.records import Comparison, Correction, Rating, Turn
from web_fixtures import QUESTION, Site, make_site, running


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


def answer(site: Site, name: str = "staff") -> str:
    reply = site.client(name).post("/v1/chat/completions", json={"messages": QUESTION})
    assert reply.status_code == 200
    return str(reply.json()["id"])


def pair(site: Site) -> dict[str, Any]:
    reply = site.client().post("/api/pairs", json={"messages": QUESTION})
    assert reply.status_code == 201, reply.text
    return dict(reply.json())


# -- ratings and corrections ------------------------------------------------------------------------------


def test_a_rating_is_stored_under_the_callers_name_with_its_reasons(site: Site) -> None:
    turn_id = answer(site)
    body = {"turn_id": turn_id, "verdict": "down", "reasons": ["too_long"], "comment": "長すぎます"}
    reply = site.client().post("/api/ratings", json=body)
    assert reply.status_code == 201
    rating = site.store.get(Rating, reply.json()["id"])
    assert (rating.turn_id, rating.person_id) == (turn_id, site.people["staff"].id)
    assert (rating.verdict, rating.reasons, rating.comment) == ("down", ["too_long"], "長すぎます")


def test_the_same_rating_twice_is_one_and_retracted_takes_it_back(site: Site) -> None:
    turn_id, client = answer(site), site.client()
    ids = {
        client.post("/api/ratings", json={"turn_id": turn_id, "verdict": "up"}).json()["id"] for _ in range(2)
    }
    assert len(ids) == 1
    assert client.post("/api/ratings", json={"turn_id": turn_id, "verdict": "retracted"}).status_code == 201
    assert feedback.ratings(site.store) == []


def test_a_correction_keeps_both_texts(site: Site) -> None:
    site.engine.enqueue(["No idea."])
    reply = site.client().post(
        "/api/corrections", json={"turn_id": answer(site), "text": "It arrives today."}
    )
    assert reply.status_code == 201
    kept = site.store.get(Correction, reply.json()["id"])
    assert (kept.original, kept.edited) == ("No idea.", "It arrives today.")


def test_the_answer_itself_is_no_correction(site: Site) -> None:
    site.engine.enqueue(["No idea."])
    reply = site.client().post("/api/corrections", json={"turn_id": answer(site), "text": "No idea."})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "text"


# -- comparisons ------------------------------------------------------------------------------------------


def test_a_pair_can_be_compared_and_the_conversation_goes_on_with_the_better_one(site: Site) -> None:
    site.engine.enqueue(["Short.", "Long and warm."])
    sides = pair(site)
    assert {sides["left"]["answer"], sides["right"]["answer"]} == {"Short.", "Long and warm."}
    reply = site.client().post(
        "/api/comparisons",
        json={
            "left_turn_id": sides["left"]["turn_id"],
            "right_turn_id": sides["right"]["turn_id"],
            "choice": "right",
            "strength": 2,
            "reasons": ["warmer"],
        },
    )
    assert reply.status_code == 201, reply.text
    kept = site.store.get(Comparison, reply.json()["id"])
    assert (kept.choice, kept.strength, kept.propensity, kept.reasons) == ("right", 2, 0.5, ["warmer"])
    turn = site.store.get(Turn, kept.right_turn_id)
    assert turn.answer == sides["right"]["answer"]
    assert (
        site.store.rows("SELECT head_turn_id FROM conversations WHERE id = ?", [turn.conversation_id])[0][
            "head_turn_id"
        ]
        == turn.id
    )


def test_both_sides_of_a_pair_belong_to_one_question_and_have_seeds_of_their_own(site: Site) -> None:
    sides = pair(site)
    left, right = (site.store.get(Turn, sides[side]["turn_id"]) for side in ("left", "right"))
    assert (left.conversation_id, left.parent_turn_id, left.messages) == (
        right.conversation_id,
        right.parent_turn_id,
        right.messages,
    )
    assert left.sampling["seed"] != right.sampling["seed"]
    assert {left.source, right.source} == {"api"}


def test_the_sides_of_a_pair_are_drawn_at_random(site: Site) -> None:
    first_on_the_left = 0
    for _ in range(24):
        site.engine.enqueue(["first", "second"])
        first_on_the_left += pair(site)["left"]["answer"] == "first"
    # Both orders come up unless 24 coins fall on one side: probability 2**-23.
    assert 0 < first_on_the_left < 24


@pytest.mark.parametrize(("field", "value"), [("stream", True), ("seed", 3), ("n", 2)])
def test_a_pair_has_no_stream_and_no_seed(site: Site, field: str, value: Any) -> None:
    reply = site.client().post("/api/pairs", json={"messages": QUESTION, field: value})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


def test_an_error_of_the_engine_in_a_pair_is_told_as_one_error(site: Site) -> None:
    site.engine.enqueue([EngineBusy("engine: full"), EngineBusy("engine: full")])
    reply = site.client().post("/api/pairs", json={"messages": QUESTION})
    assert reply.status_code == 429
    assert reply.json()["error"]["code"] == "engine_busy"


def test_another_choice_for_the_same_pair_is_a_conflict_and_the_same_is_not(site: Site) -> None:
    sides = pair(site)
    body = {"left_turn_id": sides["left"]["turn_id"], "right_turn_id": sides["right"]["turn_id"]}
    client = site.client()
    ids = {client.post("/api/comparisons", json={**body, "choice": "tie"}).json()["id"] for _ in range(2)}
    assert len(ids) == 1
    assert client.post("/api/comparisons", json={**body, "choice": "left"}).status_code == 409


def test_answers_to_two_questions_are_not_comparable(site: Site) -> None:
    body = {"left_turn_id": answer(site), "right_turn_id": answer(site), "choice": "left"}
    reply = site.client().post("/api/comparisons", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "right_turn_id"


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site to which nothing is ever written."""
    return make_site(tmp_path_factory.mktemp("quiet"))


RATING = {"turn_id": "turn_1", "verdict": "up"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/api/ratings", {"verdict": "up"}, "turn_id"),
        ("/api/ratings", {**RATING, "turn_id": 7}, "turn_id"),
        ("/api/ratings", {**RATING, "turn_id": ""}, "turn_id"),
        ("/api/ratings", {**RATING, "turn_id": "x" * 101}, "turn_id"),
        ("/api/ratings", {**RATING, "verdict": "great"}, "verdict"),
        ("/api/ratings", {**RATING, "verdict": True}, "verdict"),
        ("/api/ratings", {"turn_id": "turn_1"}, "verdict"),
        ("/api/ratings", {**RATING, "verdict": ["up"]}, "verdict"),
        ("/api/ratings", {**RATING, "reasons": "too_long"}, "reasons"),
        ("/api/ratings", {**RATING, "reasons": [1]}, "reasons"),
        ("/api/ratings", {**RATING, "reasons": ["x"] * 21}, "reasons"),
        ("/api/ratings", {**RATING, "comment": 1}, "comment"),
        ("/api/ratings", {**RATING, "comment": "x" * 4001}, "comment"),
        ("/api/ratings", {**RATING, "coment": "typo"}, "coment"),
        ("/api/corrections", {"turn_id": "turn_1"}, "text"),
        ("/api/corrections", {"turn_id": "turn_1", "text": "  "}, "text"),
        ("/api/corrections", {"turn_id": "turn_1", "text": "x" * 32_769}, "text"),
        ("/api/comparisons", {"left_turn_id": "a", "right_turn_id": "b", "choice": "both"}, "choice"),
        (
            "/api/comparisons",
            {"left_turn_id": "a", "right_turn_id": "b", "choice": "left", "strength": 4},
            "strength",
        ),
        (
            "/api/comparisons",
            {"left_turn_id": "a", "right_turn_id": "b", "choice": "left", "strength": "2"},
            "strength",
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_fix(
    quiet: Site, path: str, body: dict[str, Any], param: str
) -> None:
    reply = quiet.client().post(path, json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: got ")
    assert ";" in error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"turn_id": NaN}',
        b'{"turn_id": "\\ud800", "verdict": "up"}',
        b"[" * 100_000,
        b'{"turn_id": ' + b"1" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(quiet: Site, raw: bytes) -> None:
    reply = quiet.client().post("/api/ratings", content=raw)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "body"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/ratings", RATING),
        ("/api/corrections", {"turn_id": "turn_1", "text": "better"}),
        ("/api/comparisons", {"left_turn_id": "turn_1", "right_turn_id": "turn_2", "choice": "left"}),
    ],
)
def test_an_unknown_turn_is_not_found(quiet: Site, path: str, body: dict[str, Any]) -> None:
    reply = quiet.client().post(path, json=body)
    assert reply.status_code == 404
    assert "turn_1" in reply.json()["error"]["message"]


def test_somebody_elses_turn_is_for_reviewers_only(site: Site) -> None:
    turn_id = answer(site)
    for path, body in (
        ("/api/ratings", {"turn_id": turn_id, "verdict": "up"}),
        ("/api/corrections", {"turn_id": turn_id, "text": "Better."}),
    ):
        assert site.client("other").post(path, json=body).status_code == 403
        assert site.client("reviewer").post(path, json=body).status_code == 201
    assert {rating.person_id for rating in feedback.ratings(site.store)} == {site.people["reviewer"].id}


@pytest.mark.parametrize("path", ["/api/ratings", "/api/pairs", "/api/comparisons", "/api/corrections"])
def test_nobody_and_disabled_people_get_a_401(site: Site, path: str) -> None:
    token = site.bearer("other")
    people.disable(site.store, site.people["other"].id, actor="system")
    for headers in ({}, token):
        reply = site.client(None).post(path, json={}, headers=headers)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"].startswith("Bearer")


# -- bodies -----------------------------------------------------------------------------------------------


def test_a_long_body_is_refused_before_it_is_read(quiet: Site) -> None:
    reply = quiet.client().post("/api/ratings", content=b"x" * (API_BODY_BYTES + 1))
    assert reply.status_code == 413
    assert reply.json()["error"]["message"] == "body: got more than 262,144 bytes; send less at a time"


def test_a_body_at_the_limit_is_read(quiet: Site) -> None:
    raw = b'{"verdict": "up"'.ljust(API_BODY_BYTES - 1) + b"}"
    assert quiet.client().post("/api/ratings", content=raw).status_code == 400


def test_a_long_body_without_a_declared_length_is_refused_while_it_is_read(tmp_path: Path) -> None:
    import httpx

    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 1
            yield b"x" * 10_000

    with running(make_site(tmp_path)) as site, httpx.Client() as client:
        reply = client.post(f"{site.url}/api/ratings", content=pieces(), headers=site.bearer())
    assert reply.status_code == 413
    assert sent < 5_000  # the connection was not read to its end


@pytest.mark.parametrize("declared", ["-5", "many", "1e3"])
def test_a_strange_content_length_is_refused(quiet: Site, declared: str) -> None:
    reply = quiet.client().post("/api/ratings", content=b"{}", headers={"Content-Length": declared})
    assert reply.status_code in (400, 413)


# -- sessions on the API ----------------------------------------------------------------------------------


def test_a_session_may_use_the_api_from_our_own_pages_only(site: Site) -> None:
    turn_id = answer(site)
    client = site.signed_in("staff")
    rate = {"turn_id": turn_id, "verdict": "up"}
    for headers, status in (
        ({}, 201),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"}, 201),
        ({"Origin": "http://testserver"}, 201),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://testserver:8000"}, 403),
        ({"Origin": "null"}, 403),
    ):
        assert client.post("/api/ratings", json=rate, headers=headers).status_code == status, headers


def test_a_bad_token_is_not_rescued_by_a_good_session(site: Site) -> None:
    client = site.signed_in("staff")
    assert client.get("/v1/models").status_code == 200
    assert client.get("/v1/models", headers={"Authorization": "Bearer no"}).status_code == 401


def test_a_token_needs_no_origin(site: Site) -> None:
    headers = {**site.bearer(), "Origin": "https://help.example"}
    reply = site.client(None).post(
        "/api/ratings", json={"turn_id": answer(site), "verdict": "up"}, headers=headers
    )
    assert reply.status_code == 201


# -- headers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/login", "/healthz", "/v1/models", "/nowhere"])
def test_every_response_has_the_security_headers(quiet: Site, path: str) -> None:
    reply = quiet.client().get(path)
    assert reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "same-origin"
    assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
    assert reply.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_no_list_of_routes_is_offered(quiet: Site, path: str) -> None:
    assert quiet.client().get(path).status_code == 404


def test_no_other_site_may_read_answers(quiet: Site) -> None:
    reply = quiet.client().get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in reply.headers
