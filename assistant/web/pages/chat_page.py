"""The chat: conversations on the left, messages in the middle, feedback below the answer.

History and the current turn are two chatbots: drawing a stream costs as much as the messages around it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from assistant.chat import Ask, Delta
from assistant.web.pages import chat_session as session
from assistant.web.pages import chat_view as look
from assistant.web.pages.chat_layout import ChatLayout
from assistant.web.pages.chat_screen import (
    answer_bar,
    example_questions,
    listing_of,
    screen_of,
    title_of,
)
from assistant.web.pages.chat_view import SHOWN_TURNS, View
from assistant.web.pages.feedback_panel import FeedbackPanel
from assistant.web.pages.frame import Frame, clicked, toast
from assistant.web.pages.streaming import LiveAnswer, interval_for
from storage import conversations, feedback
from storage.errors import KotaeError
from storage.records import Json, Person, Turn, new_id

AS_IS: Json = {"show_progress": "hidden", "postprocess": False}
"""What handlers return is what the browser wants: else Gradio takes a turn in a thread for each output of an event, and
builds a model of each message only to take it apart again."""
QUICK: Json = {**AS_IS, "queue": False}
READERS_AT_ONCE = 64
"""Answers streamed at the same time; the engine queues what it cannot do at once."""
UNSEEN_S = 60.0
"""An answer whose tab was closed between its two events is given up after so long."""
Updates = dict[Any, Any]
Given = ParamSpec("Given")
Result = TypeVar("Result")


class ChatPage:
    """Components and handlers of the chat; one instance serves everybody."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.words, self.services = frame, frame.words, frame.services
        self.store = frame.services.store
        self.panel = FeedbackPanel(frame)
        self.answers: dict[str, LiveAnswer[Delta | Turn]] = {}
        """Those under way, by browser tab."""

    def build(self, blocks: gr.Blocks) -> None:
        """Add the page and connect its events."""
        self.view = gr.State(View())
        self.ui = ChatLayout(self.words, self.panel)
        self._wire(blocks)

    def _wire(self, blocks: gr.Blocks) -> None:
        screen, asked = [self.view, *self.ui.screen], [self.view, *self.ui.asked]
        asks = [
            gr.on(
                [self.ui.question.submit, self.ui.send.click],
                self.ask,
                [self.view, self.ui.question],
                [*asked, self.ui.question],
                preprocess=False,  # `check_messages` looks at the text
                **QUICK,
            ),
            self.ui.empty.click(self.ask_example, self.view, asked, **QUICK),
            self.ui.bar.submit(self.ask_again, self.view, asked, **QUICK),
            self.ui.live.edit(self.edit_live, self.view, asked, **QUICK),
            self.ui.history.edit(self.edit_history, self.view, asked, **QUICK),
        ]
        streamed = [self.view, self.ui.live, self.ui.bar]
        for question in asks:
            question.success(
                self.stream,
                self.view,
                streamed,
                concurrency_limit=READERS_AT_ONCE,
                concurrency_id="chat",
                **AS_IS,
            ).then(self.refresh_list, [self.view, self.ui.query], [self.ui.listing, self.ui.title], **QUICK)
        self.ui.stop.click(self.stop_stream, None, None, **QUICK)
        self.ui.bar.click(self.act, self.view, screen, **QUICK)
        self.ui.history.like(self.like_history, self.view, [self.view, *self.panel.outputs], **QUICK)
        self.ui.new.click(self.open_new, None, screen, **QUICK)
        self.ui.older.click(self.show_older, self.view, screen, **QUICK)
        self.ui.listing.click(self.open, self.ui.query, screen, **QUICK)
        self.ui.query.change(
            self.search, [self.ui.query, self.view], self.ui.listing, trigger_mode="always_last", **QUICK
        )
        self.ui.title.click(self.act_on_title, self.view, [*screen, self.ui.new_title], **QUICK)
        gr.on(
            [self.ui.rename.click, self.ui.new_title.submit],
            self.keep_title,
            [self.view, self.ui.new_title],
            [self.ui.title, self.ui.renaming, self.ui.listing],
            **QUICK,
        )
        self.panel.wire(self.view)
        blocks.load(self.open_new, None, screen, **QUICK)

    # -- asking ---------------------------------------------------------------------------------------

    async def ask(self, view: View, question: str, request: gr.Request) -> Updates:
        """Put the typed question on screen, unless an answer is still streaming; the stream follows."""
        with self.frame.told():
            person = self.frame.person(request)
            answer = self.answers.get(str(request.session_hash))
            if answer is not None and answer.is_shown:
                raise toast("", self.words("chat.busy"))
            view = await _beside(view, session.next_question, self.services, person, view, question)
            return await self._asked(request, person, view) | {self.ui.question: ""}

    async def ask_example(self, view: View, request: gr.Request, event: gr.EventData) -> Updates:
        """Ask the example question that was clicked."""
        with self.frame.told():
            person = self.frame.person(request)
            question = example_questions(self.services, self.words.language)[int(clicked(event)["id"])]
            view = session.next_question(self.services, person, view, question)
            return await self._asked(request, person, view)

    async def ask_again(self, view: View, request: gr.Request, event: gr.EventData) -> Updates:
        """Ask for another answer, or try again after a failure."""
        with self.frame.told():
            person, click = self.frame.person(request), clicked(event)
            if click["act"] == "retry":
                return await self._asked(request, person, session.retried(view))
            view = await asyncio.to_thread(session.again, self.services, person, view, click["id"])
            return await self._asked(request, person, view)

    async def edit_live(self, view: View, request: gr.Request, event: gr.EditData) -> Updates:
        """Ask the edited question in the place of the newest."""
        with self.frame.told():
            return await self._edited(request, view, view.live_turn_id, event)

    async def edit_history(self, view: View, request: gr.Request, event: gr.EditData) -> Updates:
        """Ask an edited earlier question; what came after it stays reachable as an alternative."""
        with self.frame.told():
            return await self._edited(request, view, self._history_turn_id(view, event.index), event)

    async def _edited(
        self, request: gr.Request, view: View, turn_id: str | None, event: gr.EditData
    ) -> Updates:
        person = self.frame.person(request)
        turn = session.own_turn(self.services, person, turn_id)
        again = partial(session.again, question=str(event.value))
        view = await asyncio.to_thread(again, self.services, person, view, turn.id)
        return await self._asked(request, person, view)

    async def _asked(self, request: gr.Request, person: Person, view: View) -> Updates:
        """Let the engine begin and return the updates that show the question.

        Until `stream` is called the browser has drawn them and sent its next event, about as long as the engine needs for
        the first token.
        """
        assert view.ask is not None
        self._begin(str(request.session_hash), view.ask)
        return await _beside(view, self._screen, person, view)

    def _begin(self, tab: str, ask: Ask) -> LiveAnswer[Delta | Turn]:
        self._leave(tab)
        answer = self.answers[tab] = LiveAnswer(self.services.chat.reply(ask), turn_id=ask.turn_id)
        answer.given_up = asyncio.get_running_loop().call_later(UNSEEN_S, self._give_up, tab, answer)
        return answer

    def _give_up(self, tab: str, answer: LiveAnswer[Delta | Turn]) -> None:
        if self.answers.get(tab) is answer:
            self._leave(tab)

    async def stream(self, view: View, request: gr.Request) -> AsyncGenerator[Updates, None]:
        """Stream the answer to `view.ask`, at last with its actions; silent once the person has gone elsewhere."""
        with self.frame.told():
            person, tab = self.frame.person(request), str(request.session_hash)
            if view.ask is None:
                return
            answer = self.answers.get(tab)
            if answer is None or answer.turn_id != view.ask.turn_id:  # this event waited for too long
                ask = replace(view.ask, turn_id=new_id("turn"))
                view, answer = replace(view, ask=ask), self._begin(tab, ask)
            problem = ""
            try:
                async with aclosing(answer.updates(interval_s=interval_for(len(self.answers)))) as events:
                    async for event in events:
                        if isinstance(event, Delta):
                            yield {self.ui.live: self._live(view, event.text), self.ui.bar: look.STREAMING}
            except KotaeError as error:
                problem = str(error)
            finally:
                is_here = self.answers.get(tab) is answer
                if is_here:
                    del self.answers[tab]
            # Gradio sends the last update once more when an event ends: of one who has gone, it must show nothing.
            gone = dict.fromkeys([self.ui.live, self.ui.bar], gr.skip())
            yield self._answered(person, view, problem) if is_here else gone

    def stop_stream(self, request: gr.Request) -> None:
        """Stop the answer of this browser tab; what was said is kept."""
        answer = self.answers.get(str(request.session_hash))
        if answer is not None:
            answer.stop()

    def _leave(self, tab: str) -> None:
        """Stop the answer of this browser tab without showing how it ended."""
        answer = self.answers.pop(tab, None)
        if answer is not None:
            answer.stop()

    def _answered(self, person: Person, view: View, problem: str) -> Updates:
        """Return the updates that end a stream: the recorded turn, or why there is none."""
        turn_id = view.ask.turn_id if view.ask else ""
        recorded = self.store.all(Turn, "id = ?", [turn_id])
        if problem or not recorded:
            bar = look.broken(self.words, problem) if problem else look.stopped(self.words)
            return {self.view: view, self.ui.bar: bar}
        view = session.settled(self.store, view, live_turn_id=turn_id)
        live = look.messages_of(recorded)
        return {self.view: view, self.ui.live: live, self.ui.bar: self._bar(person, recorded[0])}

    def _live(self, view: View, answer: str) -> list[Json]:
        """Return the messages alone: a component, even with nothing else, costs Gradio its JSON schema each time."""
        assert view.ask is not None
        return look.exchange(view.ask.messages[-1]["content"], answer)

    # -- feedback -------------------------------------------------------------------------------------

    def act(self, view: View, request: gr.Request, event: gr.EventData) -> Updates:
        """Do what a button below the latest answer says."""
        with self.frame.told():
            person, click = self.frame.person(request), clicked(event)
            turn = session.own_turn(self.services, person, click["id"])
            if click["act"] == "show":
                return self._screen(person, session.branch(self.services, person, view, turn.id))
            view = replace(view, judged_turn_id=turn.id)
            if click["act"] == "correct":
                return self.panel.opened_for_correction(turn) | {self.view: view}
            updates = self.panel.rate(person, turn, "up" if click["act"] == "up" else "down")
            return updates | {self.view: view, self.ui.bar: self._bar(person, turn)}

    def like_history(self, view: View, request: gr.Request, event: gr.LikeData) -> Updates:
        """Record a thumb in the history: "" takes it back, it is no downvote."""
        with self.frame.told():
            person = self.frame.person(request)
            turn = session.own_turn(self.services, person, self._history_turn_id(view, event.index))
            if event.liked == "":
                feedback.rate(self.store, turn_id=turn.id, person_id=person.id, verdict="retracted")
                return self.panel.hidden() | {self.view: view}
            rating = feedback.rate(
                self.store, turn_id=turn.id, person_id=person.id, verdict="up" if event.liked else "down"
            )
            return self.panel.shown(turn, rating) | {self.view: replace(view, judged_turn_id=turn.id)}

    def _history_turn_id(self, view: View, index: int | tuple[int, int]) -> str:
        """Return the turn of a message on screen; two messages are one turn."""
        shown = view.history_turn_ids[-view.shown_turns :]
        return shown[(index if isinstance(index, int) else index[0]) // 2]

    # -- conversations --------------------------------------------------------------------------------

    async def open_new(self, request: gr.Request) -> Updates:
        """Show an empty screen; the conversation begins with its first question."""
        self._leave(str(request.session_hash))
        with self.frame.told():
            return self._screen(self.frame.person(request), View())

    def open(self, query: str, request: gr.Request, event: gr.EventData) -> Updates:
        """Show the conversation that was clicked, if it is the person's own."""
        self._leave(str(request.session_hash))
        with self.frame.told():
            person = self.frame.person(request)
            view = session.open_conversation(self.services, person, clicked(event)["id"])
            listing = listing_of(self.services, self.words, person, view, query)
            return self._screen(person, view) | {self.ui.listing: listing}

    def show_older(self, view: View, request: gr.Request) -> Updates:
        """Show some more of the earlier turns."""
        with self.frame.told():
            view = replace(view, shown_turns=view.shown_turns + SHOWN_TURNS)
            return self._screen(self.frame.person(request), view)

    def search(self, query: str, view: View, request: gr.Request) -> str:
        """List the conversations that hold every word."""
        with self.frame.told():
            person = self.frame.person(request)
            return listing_of(self.services, self.words, person, view, query)

    def act_on_title(self, view: View, request: gr.Request, event: gr.EventData) -> Updates:
        """Rename or delete the open conversation; deleting asks first."""
        with self.frame.told():
            person, act = self.frame.person(request), clicked(event)["act"]
            conversation = self.services.chat.conversation(person, view.conversation_id or "")
            if act == "rename":
                return {self.ui.renaming: look.marker("renaming"), self.ui.new_title: conversation.title}
            if act == "delete":
                return {self.ui.title: look.delete_bar(self.words)}
            if act == "delete-yes":
                conversations.delete_conversation(self.store, conversation.id, actor=person.id)
                return self._screen(person, View())
            return {self.ui.title: look.title_bar(self.words, conversation)}

    async def keep_title(self, view: View, title: str, request: gr.Request) -> Updates:
        """Rename the open conversation."""
        with self.frame.told():
            person = self.frame.person(request)
            conversation = self.services.chat.conversation(person, view.conversation_id or "")
            rename = partial(conversations.rename_conversation, title=title, actor=person.id)
            await asyncio.to_thread(rename, self.store, conversation.id)
            listing, bar = await self.refresh_list(view, "", request)
            return {self.ui.listing: listing, self.ui.title: bar, self.ui.renaming: ""}

    async def refresh_list(self, view: View, query: str, request: gr.Request) -> tuple[str, str]:
        """Return the list and the title as they are after an answer."""
        with self.frame.told():
            person = self.frame.person(request)
            listing = listing_of(self.services, self.words, person, view, query)
            return listing, title_of(self.services, self.words, person, view)

    def _screen(self, person: Person, view: View) -> Updates:
        """Return the updates that draw the whole view."""
        screen = screen_of(self.services, self.words, person, view)
        return self.ui.drawn(screen) | self.panel.hidden() | {self.view: view}

    def _bar(self, person: Person, turn: Turn) -> str:
        return answer_bar(self.store, self.words, person, turn)


async def _beside(
    view: View, work: Callable[Given, Result], *args: Given.args, **named: Given.kwargs
) -> Result:
    """Return the result of `work`: of a long conversation in a thread, of a new one at once, which is sooner done."""
    if view.history_turn_ids or view.live_turn_id:
        return await asyncio.to_thread(work, *args, **named)
    return work(*args, **named)
