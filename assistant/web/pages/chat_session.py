"""What a person does in the chat, as functions from one `View` to the next; texts come from storage, by id."""

from __future__ import annotations

from dataclasses import replace

from assistant.chat import Ask
from assistant.web.pages.chat_view import SHOWN_TURNS, View
from assistant.web.services import Services
from storage import conversations
from storage.errors import NotFound
from storage.records import Conversation, Person, Turn, new_id
from storage.store import Store


def path_to(store: Store, turn_id: str | None) -> list[Turn]:
    """Return the turns from the start of the conversation to `turn_id`, both included."""
    path: list[Turn] = []
    while turn_id is not None:
        turn = conversations.get_turn(store, turn_id)
        path.insert(0, turn)
        turn_id = turn.parent_turn_id
    return path


def open_conversation(services: Services, person: Person, conversation_id: str) -> View:
    """Return the view of one of the person's conversations, as it was left."""
    conversation = services.chat.conversation(person, conversation_id)
    return settled(
        services.store, View(conversation_id=conversation.id), live_turn_id=conversation.head_turn_id
    )


def settled(store: Store, view: View, *, live_turn_id: str | None) -> View:
    """Return the view after an answer is complete: it is the live turn, those before it are history."""
    path = path_to(store, live_turn_id)
    return replace(
        view,
        live_turn_id=live_turn_id,
        ask=None,
        history_turn_ids=tuple(turn.id for turn in path[:-1]),
        judged_turn_id=live_turn_id,
    )


def asking(store: Store, view: View, ask: Ask) -> View:
    """Return the view while `ask` is being answered."""
    return replace(
        view,
        conversation_id=ask.conversation_id,
        ask=ask,
        live_turn_id=None,
        judged_turn_id=None,
        history_turn_ids=tuple(turn.id for turn in path_to(store, ask.parent_turn_id)),
        shown_turns=SHOWN_TURNS,
    )


def current(services: Services, person: Person, view: View) -> Conversation | None:
    """Return the open conversation; None where none is open, or it waits for its first answer to be kept."""
    if view.conversation_id is None:
        return None
    try:
        return services.chat.conversation(person, view.conversation_id)
    except NotFound:
        if view.ask is None or view.ask.begins is None:
            raise
        return None


def next_question(services: Services, person: Person, view: View, question: str) -> View:
    """Return the view that asks the next question, in a new conversation when none is open.

    Raises:
        InvalidField: the question is empty or too long; nothing was made.
    """
    conversation = current(services, person, view)
    if conversation is None:
        return asking(services.store, view, services.chat.ask_first(person, question))
    return asking(services.store, view, services.chat.ask(person, conversation, question))


def again(
    services: Services, person: Person, view: View, turn_id: str, *, question: str | None = None
) -> View:
    """Return the view that answers a question once more, or an edited one in its place."""
    return asking(services.store, view, services.chat.ask_again(person, turn_id, question=question))


def retried(view: View) -> View:
    """Return the view that asks again what got no answer."""
    if view.ask is None:
        raise NotFound("question", "none", "ask one")
    return replace(view, ask=replace(view.ask, turn_id=new_id("turn")))


def branch(services: Services, person: Person, view: View, turn_id: str) -> View:
    """Return the view of another answer at the same place, with what followed it."""
    leaf = conversations.get_turn(services.store, turn_id)
    services.chat.conversation(person, leaf.conversation_id)
    while True:
        children = services.store.all(Turn, "parent_turn_id = ?", [leaf.id], order="seq DESC", limit=1)
        if not children:
            break
        leaf = children[0]
    conversations.set_head(services.store, leaf.conversation_id, turn_id=leaf.id, actor=person.id)
    return settled(services.store, view, live_turn_id=leaf.id)


def own_turn(services: Services, person: Person, turn_id: str | None) -> Turn:
    """Return a turn of one of the person's conversations."""
    if turn_id is None:
        raise NotFound("answer", "none", "ask something first")
    turn = conversations.get_turn(services.store, turn_id)
    services.chat.conversation(person, turn.conversation_id)
    return turn
