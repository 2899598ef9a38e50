"""What people think of answers: ratings, comparisons and corrections, each kept once and never changed.

Changing one's mind adds a row; which row counts is decided when reading. How labels become training data is
the business of `alignment.preferences`.
"""

from __future__ import annotations

from collections.abc import Sequence

from storage.conversations import get_conversation, get_turn
from storage.errors import Conflict, InvalidField, NotAllowed
from storage.people import get_person, may
from storage.records import Choice, Comparison, Correction, Rating, Turn, Verdict, new_id, now
from storage.store import Store

_CURRENT_RATINGS = """verdict <> 'retracted' AND created_at <= :until AND created_at > :since AND NOT EXISTS (
    SELECT 1 FROM ratings AS later WHERE later.turn_id = ratings.turn_id
        AND later.person_id = ratings.person_id AND later.seq > ratings.seq AND later.created_at <= :until)"""
_CURRENT_CORRECTIONS = """created_at <= :until AND created_at > :since AND NOT EXISTS (
    SELECT 1 FROM corrections AS later WHERE later.turn_id = corrections.turn_id
        AND later.person_id = corrections.person_id AND later.seq > corrections.seq
        AND later.created_at <= :until)"""
_FOREVER = 1e18
_MIRRORED: dict[Choice, Choice] = {"left": "right", "right": "left"}


def rate(
    store: Store,
    *,
    turn_id: str,
    person_id: str,
    verdict: Verdict,
    reasons: Sequence[str] = (),
    comment: str = "",
) -> Rating:
    """Keep a person's thumb on a turn; the last one counts. The same thumb again is not kept twice.

    Raises:
        NotAllowed: it is not the person's own conversation, and they are no reviewer.
    """
    rating = Rating(
        id=new_id("rating"),
        turn_id=turn_id,
        person_id=person_id,
        verdict=verdict,
        reasons=_reasons(reasons),
        comment=comment,
        created_at=now(),
    )
    _check_rater(store, get_turn(store, turn_id), person_id)
    with store.transaction(person_id) as changes:
        latest = _latest_rating(store, turn_id, person_id)
        if latest is not None and _opinion(latest) == _opinion(rating):
            return latest
        changes.insert(rating)
        changes.audit("turn.rated", turn_id, rating_id=rating.id, verdict=verdict)
    return rating


def compare(
    store: Store,
    *,
    left_turn_id: str,
    right_turn_id: str,
    person_id: str,
    choice: Choice,
    strength: int | None = None,
    propensity: float = 0.5,
    reasons: Sequence[str] = (),
) -> Comparison:
    """Keep a person's choice between two answers to the same question, in the order in which they were shown.

    Raises:
        InvalidField: the two turns do not answer the same question.
        Conflict: the person chose otherwise between these two before.
        NotAllowed: it is not the person's own conversation, and they are no reviewer.
    """
    comparison = Comparison(
        id=new_id("comparison"),
        left_turn_id=left_turn_id,
        right_turn_id=right_turn_id,
        person_id=person_id,
        choice=choice,
        strength=strength,
        propensity=propensity,
        reasons=_reasons(reasons),
        created_at=now(),
    )
    left, right = get_turn(store, left_turn_id), get_turn(store, right_turn_id)
    _check_pair(left, right)
    _check_strength(choice, strength)
    _check_rater(store, left, person_id)
    with store.transaction(person_id) as changes:
        first = _comparison_of(store, comparison)
        if first is not None:
            return _same_choice(first, comparison)
        changes.insert(comparison)
        changes.audit(
            "turns.compared", left_turn_id, right_turn_id=right_turn_id, comparison_id=comparison.id
        )
    return comparison


def correct(store: Store, *, turn_id: str, person_id: str, edited: str) -> Correction:
    """Keep an answer as the person would have written it; the last one counts, the same is not kept twice.

    Raises:
        InvalidField: the text is empty or the answer itself.
        NotAllowed: it is not the person's own conversation, and they are no reviewer.
    """
    turn = get_turn(store, turn_id)
    _check_rater(store, turn, person_id)
    if not edited.strip() or edited == turn.answer:
        raise InvalidField("text", edited, "change the answer; to agree with it, rate it")
    correction = Correction(
        id=new_id("correction"),
        turn_id=turn_id,
        person_id=person_id,
        original=turn.answer,
        edited=edited,
        created_at=now(),
    )
    with store.transaction(person_id) as changes:
        mine = store.all(Correction, "turn_id = ? AND person_id = ?", [turn_id, person_id], order="seq")
        if mine and mine[-1].edited == edited:
            return mine[-1]
        changes.insert(correction)
        changes.audit("turn.corrected", turn_id, correction_id=correction.id)
    return correction


def current_rating(store: Store, *, turn_id: str, person_id: str) -> Rating | None:
    """Return the person's thumb on the turn; None when there is none or it was taken back."""
    latest = _latest_rating(store, turn_id, person_id)
    return None if latest is None or latest.verdict == "retracted" else latest


def ratings(store: Store, *, until: float | None = None) -> list[Rating]:
    """Return the thumbs that counted at `until` (now), oldest first: each person's last on a turn."""
    return store.all(Rating, *_bound(_CURRENT_RATINGS, 0.0, until))


def comparisons(store: Store, *, until: float | None = None) -> list[Comparison]:
    """Return the choices made up to `until` (now), oldest first."""
    return store.all(Comparison, *_bound("created_at <= :until AND created_at > :since", 0.0, until))


def corrections(store: Store, *, until: float | None = None) -> list[Correction]:
    """Return the corrections that counted at `until` (now), oldest first: a person's last on a turn."""
    return store.all(Correction, *_bound(_CURRENT_CORRECTIONS, 0.0, until))


def count_labels(store: Store, *, since: float = 0.0) -> int:
    """Return how many current ratings, comparisons and corrections were made after `since`."""
    conditions = {
        "ratings": _CURRENT_RATINGS,
        "comparisons": "created_at <= :until AND created_at > :since",
        "corrections": _CURRENT_CORRECTIONS,
    }
    total = 0
    for table, condition in conditions.items():
        where, params = _bound(condition, since, None)
        total += store.rows(f"SELECT count(*) AS n FROM {table} WHERE {where}", params)[0]["n"]
    return total


def _bound(condition: str, since: float, until: float | None) -> tuple[str, list[float]]:
    """Return the condition with its two times as positional parameters, in the order in which they stand."""
    values = {":until": _FOREVER if until is None else until, ":since": since}
    pieces = condition.replace(":until", "\0:until\0").replace(":since", "\0:since\0").split("\0")
    return "".join("?" if piece in values else piece for piece in pieces), [
        values[piece] for piece in pieces if piece in values
    ]


def _reasons(reasons: Sequence[str]) -> list[str]:
    if isinstance(reasons, str) or any(not isinstance(reason, str) for reason in reasons):
        raise InvalidField("reasons", reasons, "use a list of texts")
    return list(reasons)


def _check_rater(store: Store, turn: Turn, person_id: str) -> None:
    person = get_person(store, person_id)
    owner = get_conversation(store, turn.conversation_id).person_id == person.id
    if person.disabled or not (owner or may(person, "reviewer")):
        raise NotAllowed(
            f"{person.name} may judge answers of their own conversations; others need a reviewer"
        )


def _check_pair(left: Turn, right: Turn) -> None:
    same_place = (left.conversation_id, left.parent_turn_id) == (right.conversation_id, right.parent_turn_id)
    if left.id == right.id or not same_place or left.messages != right.messages:
        raise InvalidField("right_turn_id", right.id, f"use another answer to the question of {left.id}")


def _check_strength(choice: Choice, strength: int | None) -> None:
    if strength is not None and (choice not in ("left", "right") or strength not in (1, 2, 3)):
        raise InvalidField("strength", strength, "use 1, 2 or 3 with a winner, and none for tie or both_bad")


def _latest_rating(store: Store, turn_id: str, person_id: str) -> Rating | None:
    where = "turn_id = ? AND person_id = ?"
    found = store.all(Rating, where, [turn_id, person_id], order="seq DESC", limit=1)
    return found[0] if found else None


def _opinion(rating: Rating) -> tuple[Verdict, list[str], str]:
    return rating.verdict, rating.reasons, rating.comment


def _comparison_of(store: Store, comparison: Comparison) -> Comparison | None:
    """Return the person's earlier choice between the two turns, whichever side they were on."""
    pair = sorted((comparison.left_turn_id, comparison.right_turn_id))
    where = (
        """person_id = ? AND min(left_turn_id, right_turn_id) = ? AND max(left_turn_id, right_turn_id) = ?"""
    )
    found = store.all(Comparison, where, [comparison.person_id, *pair])
    return found[0] if found else None


def _same_choice(first: Comparison, again: Comparison) -> Comparison:
    mirrored = first.left_turn_id != again.left_turn_id
    choice = _MIRRORED.get(again.choice, again.choice) if mirrored else again.choice
    if first.choice != choice:
        raise Conflict(
            f"choice: {first.choice} is already recorded for this pair; a choice stays as it was made"
        )
    return first
