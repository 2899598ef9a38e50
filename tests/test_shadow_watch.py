"""What is known of a shadow: the arithmetic, the stops that withdraw it, and where the operator reads it."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

import app
from assistant.server import note_death
from assistant.shadow_evidence import OF_DIFFERENCE, OF_SHARE, Pair, agreement, estimates, ratio
from assistant.shadow_watch import ShadowWatch, last_evidence
from assistant.web.pages.served_page import served_html
from assistant.web.pages.shadow_view import shadow_html
from assistant.web.words import Words
from storage import audit, conversations, deployments
from storage.records import AuditEvent, Conversation, Deployment, ShadowFinish
from storage.shadows import record_shadow_answer
from storage_fixtures import (
    World,
    add_candidate,
    approve,
    deploy,
    make_world,
    record,
    shadow_answer,
    start_conversation,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def shade(world: World, *, share: float = 1.0) -> Deployment:
    policy = add_candidate(world)
    approve(world, policy)
    return deploy(world, policy, "shadow", share=share)


def answer(
    world: World,
    shadow: Deployment,
    text: str = "It is on its way.",
    *,
    finish: ShadowFinish = "stop",
    ids: tuple[int, ...] = (4, 5),
    conversation: Conversation | None = None,
) -> None:
    """Let stable answer "It is on its way." with ids 4 5 in 0.5 s, and the shadow this in 1 s."""
    turn = record(world, conversation or start_conversation(world))
    row = shadow_answer(turn, shadow, answer=text, answer_token_ids=list(ids), finish_reason=finish)
    record_shadow_answer(world.store, row)


# -- the arithmetic ---------------------------------------------------------------------------------------


def test_a_share_of_single_questions_is_agresti_and_coulls() -> None:
    # 3 of 16, with two of each outcome added 5 of 20: 0.25 +- 1.96 sqrt(0.25 * 0.75 / 20 * 20/19).
    got = ratio([(f"c{n}", float(n < 3), 1.0) for n in range(16)], OF_SHARE)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 19)
    assert got.value == 3 / 16
    assert (got.low, got.high) == pytest.approx((0.25 - half, 0.25 + half), rel=1e-12)


def test_a_ratio_is_of_sums_and_its_interval_of_conversations() -> None:
    # 40 above 20; ratio 2; what each conversation adds beyond it: 10 - 2*6 = -2, 30 - 2*14 = 2.
    got = ratio([("a", 4, 3), ("a", 6, 3), ("b", 30, 14)])
    half = 1.96 * math.sqrt(2 / 1 * (4 + 4)) / 20
    assert got.value == 2.0
    assert (got.low, got.high) == pytest.approx((2 - half, 2 + half), rel=1e-12)


def test_the_same_questions_in_fewer_conversations_say_less() -> None:
    apart = ratio([(f"c{n}", float(n % 2), 1.0) for n in range(40)], OF_SHARE)
    together = ratio([(f"c{n % 4}", float(n % 2), 1.0) for n in range(40)], OF_SHARE)
    assert apart.value == together.value
    assert together.high - together.low > 1.5 * (apart.high - apart.low)  # type: ignore[operator]


@pytest.mark.parametrize("made_up", [OF_SHARE, OF_DIFFERENCE])
def test_an_interval_does_not_shrink_to_nothing_where_nothing_happened(
    made_up: tuple[tuple[float, float], ...],
) -> None:
    got = ratio([(f"c{n}", 0.0, 1.0) for n in range(50)], made_up)
    assert got.low is not None
    assert got.high is not None
    assert got.low <= 0.0 < 0.02 < got.high


def test_without_answers_there_is_no_number_and_with_one_conversation_no_interval() -> None:
    assert ratio([]).value is None
    one = ratio([("a", 4, 2)])
    assert (one.value, one.low, one.high) == (2.0, None, None)


def test_agreement_counts_each_shared_token_once() -> None:
    assert agreement([1, 2, 2, 3], [2, 2, 2]) == 2 * 2 / 7
    assert agreement([1, 2], [2, 1]) == 1.0
    assert agreement([], []) == 1.0
    assert agreement([1], []) == 0.0


def test_intervals_hold_the_truth_in_about_95_of_100_cases_although_questions_come_in_conversations() -> None:
    drawn, held = random.Random(0), 0
    for _ in range(400):
        observations = []
        for conversation in range(60):
            rate = drawn.betavariate(1, 9)  # of this conversation; 0.1 over all
            observations += [
                (f"c{conversation}", float(drawn.random() < rate), 1.0) for _ in range(drawn.randint(1, 5))
            ]
        got = ratio(observations, OF_SHARE)
        held += got.low <= 0.1 <= got.high  # type: ignore[operator]
    # Binomial(400, 0.95): mean 380, sd 4.4; four of them below, and never always.
    assert 362 <= held < 400


def test_of_a_failed_answer_only_the_failure_counts() -> None:
    pair = Pair(
        conversation_id="a",
        failed=False,
        empty=False,
        handed_over=True,
        tokens=30,
        total_s=2.0,
        served_empty=False,
        served_handed_over=False,
        served_tokens=20,
        served_total_s=1.0,
        agreement=0.5,
    )
    broken = replace(pair, conversation_id="b", failed=True, empty=True, tokens=0, agreement=0.0)
    got = {name: one.value for name, one in estimates([pair, broken]).items()}
    assert got == {
        "failed": 0.5,
        "empty": 0.0,
        "served_empty": 0.0,
        "empty_difference": 0.0,
        "hand_over": 1.0,
        "served_hand_over": 0.0,
        "hand_over_difference": 1.0,
        "length_ratio": 1.5,
        "latency_ratio": 2.0,
        "agreement": 0.5,
    }


# -- the watch --------------------------------------------------------------------------------------------


def test_without_a_shadow_there_is_nothing_to_look_at(world: World) -> None:
    assert ShadowWatch(world.store).look() is None
    assert last_evidence(world.store) is None


def test_the_evidence_holds_each_answer_against_the_served_one_and_counts_what_was_skipped(
    world: World,
) -> None:
    record(world, start_conversation(world))  # before the shadow began
    shadow = shade(world)
    watch = ShadowWatch(world.store)
    answer(world, shadow, "I am handing you over to a colleague.", ids=(4, 6, 7, 8))
    watch.look()
    answer(world, shadow)
    record(world, start_conversation(world))
    record(world, start_conversation(world), finish_reason="cancelled")  # the shadow would not be asked
    found = watch.look()
    assert found is not None
    assert (found.answered, found.failed, found.skipped) == (2, 0, 1)
    assert (found.policy_id, found.stable_id) == (shadow.policy_id, world.base.id)
    values = {name: one.value for name, one in found.measures.items()}
    assert values["length_ratio"] == 6 / 4
    assert values["latency_ratio"] == 2.0
    assert (values["hand_over"], values["served_hand_over"]) == (0.5, 0.0)
    assert values["agreement"] == (2 * 1 / 6 + 1) / 2
    assert ShadowWatch(world.store).look() == found  # after a restart
    assert last_evidence(world.store) == found
    assert deployments.served(world.store).shadow == shadow  # type: ignore[union-attr]


def test_a_new_share_begins_anew_and_only_drawn_questions_can_be_skipped(world: World) -> None:
    shadow = shade(world)
    watch = ShadowWatch(world.store)
    answer(world, shadow)
    assert watch.look().answered == 1  # type: ignore[union-attr]
    deploy(world, world.store.get(type(world.base), shadow.policy_id), "shadow", share=1e-9)
    record(world, start_conversation(world))
    found = watch.look()
    assert found is not None
    assert (found.answered, found.skipped) == (0, 0)


def test_what_was_deleted_is_not_counted_after_a_restart(world: World) -> None:
    shadow, conversation = shade(world), start_conversation(world)
    answer(world, shadow, conversation=conversation)
    conversations.delete_conversation(world.store, conversation.id, actor=world.staff.id)
    found = ShadowWatch(world.store).look()
    assert found is not None
    assert (found.answered, found.skipped) == (0, 0)


@pytest.mark.parametrize(
    ("text", "finish", "times", "reason"),
    [
        (" ", "stop", 3, "3 of the shadow's 3 answers of the last 300 s were empty"),
        ("", "error", 3, "3 of the shadow's 3 requests failed, 0% of stable's"),
        ("Hi", "wrong_policy", 1, "another policy answered 1 questions in the shadow's place"),
    ],
)
def test_a_broken_shadow_is_withdrawn_with_the_reason(
    world: World, text: str, finish: ShadowFinish, times: int, reason: str
) -> None:
    shadow, watch = shade(world), ShadowWatch(world.store)
    for _ in range(times):
        assert not watch.look().stops  # type: ignore[union-attr]
        answer(world, shadow, text, finish=finish)
    found = watch.look()
    assert found is not None
    assert found.stops == (reason,)
    assert deployments.served(world.store).shadow is None  # type: ignore[union-attr]
    row = deployments.history(world.store, 1)[0]
    assert (row.policy_id, row.role, row.actor) == (shadow.policy_id, "retired", "system")
    assert reason in row.reason
    (event,) = world.store.all(AuditEvent, "action = 'shadow.stopped'")
    assert (event.subject, event.detail["reasons"]) == (shadow.policy_id, [reason])
    assert audit.verify(world.store).ok
    assert watch.look() is None
    assert reason in shadow_html(Words("en"), last_evidence(world.store)).replace("&#x27;", "'")


def test_errors_that_stable_has_as_well_do_not_withdraw_the_shadow(world: World) -> None:
    shadow = shade(world)
    for _ in range(4):
        answer(world, shadow, "", finish="error")
        record(world, start_conversation(world), finish_reason="error")
    assert not ShadowWatch(world.store).look().stops  # type: ignore[union-attr]


def test_an_engine_that_dies_with_a_shadow_in_it_withdraws_the_shadow(world: World) -> None:
    shadow, watch = shade(world), ShadowWatch(world.store)
    for _ in range(2):
        assert not watch.look().stops  # type: ignore[union-attr]
        note_death(world.store)
    assert "engine died 2 times" in watch.look().stops[0]  # type: ignore[union-attr]
    assert world.store.rows("SELECT DISTINCT policy_id FROM failures") == [{"policy_id": shadow.policy_id}]


# -- where it is read -------------------------------------------------------------------------------------


def test_the_operator_reads_the_shadow_in_both_languages(world: World) -> None:
    assert shadow_html(Words("en"), last_evidence(world.store)) == ""
    shadow = shade(world, share=1.0)
    for _ in range(3):
        answer(world, shadow, ids=(4, 6, 7, 8))
    ShadowWatch(world.store).look()
    shown = shadow_html(Words("en"), last_evidence(world.store))
    assert f"{shadow.policy_id} answered 3 questions, failed at 0; 0 were skipped" in shown
    assert "2.00×" in shown  # twice as long, and twice the time
    assert "33.3%" in shown  # agreement: 2 * 1 / 6
    assert "シャドー" in shadow_html(Words("ja"), last_evidence(world.store))
    cards = served_html(Words("en"), world.store, deployments.served(world.store))
    assert "Shadow" in cards
    assert cards.count("100%</b>") == 2  # stable answers everybody all the same


def test_the_command_line_shades_shows_and_withdraws(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "assistant.decisions.check_files", lambda store, policy: None
    )  # its adapter is no folder
    policy, data = add_candidate(world), ["--data", str(world.store.data), "--json"]

    def run(*arguments: str) -> tuple[int, str]:
        code = app.main([*arguments, *data])
        return code, capsys.readouterr().out

    deciding = ("--as", "Admin", "--reason", "a look first")
    code, printed = run("approve", policy.id, "--shadow", "40", *deciding)
    row = json.loads(printed)
    assert (code, row["role"], row["share"]) == (0, "shadow", 0.4)
    assert json.loads(run("status")[1])["shadow"] == {"policy": policy.id, "share": 0.4}
    answer(world, deployments.history(world.store, 1)[0])
    ShadowWatch(world.store).look()
    shadow = json.loads(run("status")[1])["shadow"]
    assert (shadow["answered"], shadow["measures"]["length_ratio"]["value"]) == (1, 1.0)
    assert run("rollback", "--shadow", *deciding)[0] == 0
    assert json.loads(run("status")[1])["shadow"] is None
    assert run("rollback", "--shadow", *deciding)[0] == 2
    with pytest.raises(SystemExit):
        run("approve", policy.id, "--shadow", "40", "--canary", "40", *deciding)
