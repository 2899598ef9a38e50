"""Which conversations a canary is judged by, and what counts against a policy: on a real SQLite file."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage import feedback
from storage.outcomes import Outcome, answers_after, outcomes
from storage.records import Conversation, Deployment, Policy, Turn, now
from storage.store import Store
from storage_fixtures import (
    World,
    add_candidate,
    approve,
    ask,
    deploy,
    make_world,
    record,
    start_conversation,
)

LATER = 1800.0 + 60


class Trial:
    """A world with a canary, and conversations on either arm."""

    def __init__(self, data: Path) -> None:
        self.world: World = make_world(data)
        self.store: Store = self.world.store
        self.before = start_conversation(self.world)
        record(self.world, self.before, total_s=0.0)
        self.policy: Policy = add_candidate(self.world)
        approve(self.world, self.policy)
        self.canary: Deployment = deploy(self.world, self.policy, "canary", share=0.1)

    def turn(self, conversation: Conversation, *, canary: bool = True, **changes: object) -> Turn:
        served = self.canary if canary else self.world.deployment
        fields = {"policy_id": served.policy_id, "deployment_id": served.id, "total_s": 0.0, **changes}
        return record(self.world, conversation, **fields)

    def read(self, *, after: float = 0.0, until: float | None = None) -> list[Outcome]:
        return outcomes(
            self.store,
            canary_id=self.policy.id,
            stable_id=self.world.base.id,
            began_at=self.canary.created_at,
            after=after,
            until=now() + LATER if until is None else until,
            hand_over=["a colleague"],
        )

    def negative(self) -> set[str]:
        (only,) = self.read()
        return set(only.negative)


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path / "data")


def test_conversations_come_in_the_order_in_which_they_conclude_with_their_policy(trial: Trial) -> None:
    first, second = start_conversation(trial.world), start_conversation(trial.world)
    opening = trial.turn(first, canary=True, answer_token_ids=[1, 2, 3])
    trial.turn(second, canary=False)
    trial.turn(first, canary=True, parent_turn_id=opening.id)
    found = trial.read()
    assert [(one.conversation_id, one.policy_id) for one in found] == [
        (first.id, trial.policy.id),
        (second.id, trial.world.base.id),
    ]
    assert found[0].tokens == 3
    assert found[0].concluded_at == pytest.approx(found[0].began_at + 1800)
    assert all(not one.negative for one in found)


def test_a_conversation_is_read_once_and_only_when_it_is_concluded(trial: Trial) -> None:
    trial.turn(start_conversation(trial.world))
    assert trial.read(until=now()) == []
    (one,) = trial.read()
    assert trial.read(after=one.concluded_at) == []


def test_a_conversation_that_was_going_on_was_not_drawn(trial: Trial) -> None:
    trial.turn(trial.before, canary=False)
    assert trial.read() == []


def test_an_answer_that_began_before_the_canary_was_not_drawn(trial: Trial) -> None:
    conversation = start_conversation(trial.world)
    trial.turn(conversation, canary=False, total_s=600.0)
    trial.turn(conversation)
    assert trial.read() == []


def test_a_thumb_down_counts_until_it_is_taken_back(trial: Trial) -> None:
    turn, person = trial.turn(start_conversation(trial.world)), trial.world.staff.id
    feedback.rate(trial.store, turn_id=turn.id, person_id=person, verdict="down")
    assert trial.negative() == {"down"}
    feedback.rate(trial.store, turn_id=turn.id, person_id=person, verdict="retracted")
    assert trial.negative() == set()


def test_what_is_said_after_the_conclusion_does_not_count(trial: Trial) -> None:
    turn = trial.turn(start_conversation(trial.world), created_at=now() + 0.2)
    feedback.rate(trial.store, turn_id=turn.id, person_id=trial.world.staff.id, verdict="down")
    with trial.store.transaction("system") as changes:
        late = feedback.Rating(
            id="rating_late",
            turn_id=turn.id,
            person_id=trial.world.staff.id,
            verdict="retracted",
            reasons=[],
            comment="",
            created_at=now() + 3600,
        )
        changes.insert(late)
        changes.audit("turn.rated", turn.id, rating_id=late.id, verdict="retracted")
    assert trial.negative() == {"down"}


@pytest.mark.parametrize(
    ("rival", "choice", "expected"),
    [
        (False, "left", set()),
        (False, "right", {"lost"}),
        (False, "both_bad", {"lost"}),
        (False, "tie", set()),
        (True, "right", set()),
        (True, "both_bad", {"lost"}),
    ],
)
def test_a_comparison_is_lost_against_another_policy_only(
    trial: Trial, rival: bool, choice: str, expected: set[str]
) -> None:
    conversation = start_conversation(trial.world)
    left = trial.turn(conversation, source="compare")
    right = trial.turn(conversation, canary=rival, source="compare")
    feedback.compare(
        trial.store,
        left_turn_id=left.id,
        right_turn_id=right.id,
        person_id=trial.world.staff.id,
        choice=choice,  # type: ignore[arg-type]
    )
    assert trial.negative() == expected


def test_a_correction_a_rewritten_question_and_a_hand_over_count(trial: Trial) -> None:
    conversation = start_conversation(trial.world)
    turn = trial.turn(conversation)
    feedback.correct(trial.store, turn_id=turn.id, person_id=trial.world.staff.id, edited="Tomorrow.")
    assert trial.negative() == {"corrected"}
    trial.turn(conversation, messages=ask("Where is parcel 48213?"))
    assert trial.negative() == {"corrected", "rewritten"}
    trial.turn(conversation, parent_turn_id=turn.id, answer="A colleague will write to you.")
    assert trial.negative() == {"corrected", "rewritten", "handed_over"}


def test_two_answers_to_compare_are_no_rewriting(trial: Trial) -> None:
    conversation = start_conversation(trial.world)
    for _ in range(2):
        trial.turn(conversation, source="compare")
    assert trial.negative() == set()


def test_an_answer_of_white_space_alone_is_empty_as_it_is_everywhere_else(trial: Trial) -> None:
    conversation = start_conversation(trial.world)
    every_space = "".join(letter for letter in map(chr, range(0x11000)) if not letter.strip())
    texts = ["", "\n\n", "\u3000", every_space, f"{every_space}.{every_space}"]
    for text in texts:
        trial.turn(conversation, answer=text)
    policy_ids = (trial.policy.id, trial.world.base.id)
    found = answers_after(trial.store, 0, policy_ids=policy_ids, began_at=trial.canary.created_at)
    assert [answer.is_empty for answer in found] == [not text.strip() for text in texts]
