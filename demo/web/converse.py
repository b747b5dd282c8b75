"""One turn: the question, the streamed answer, the server's account, and the measured recompute."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

from web.client import Answer, Client, ServerError
from web.sessions import Conversation
from web.turns import Turn, account, shared_prefix, trace_of

ROOM = 16
"""Rows of the pool that a conversation leaves free."""


def converse(
    client: Client,
    conversation: Conversation,
    question: str,
    max_new_tokens: int,
    pool: int,
    measure: bool,
) -> Iterator[None]:
    """Run a turn; yields when there is something new to show. Mutates the conversation.

    measure: ask the same prompt once more where nothing of it can be found, for its time to
    first token, if something was restored and the pool holds both. A failure ends the turn with
    a notice; what was asked is taken back, so that it can be asked again.
    """
    conversation.ask(question)
    conversation.running, conversation.notice = True, ""
    conversation.used = time.monotonic()
    messages = conversation.messages
    turn: Turn | None = None
    try:
        yield
        ids = client.chat_ids(messages)
        if pool and len(ids) + max_new_tokens + ROOM > pool:
            raise ServerError(
                f"This conversation has grown to {len(ids):,} tokens and the pool holds "
                f"{pool:,}. Start another one."
            )
        known = shared_prefix(ids[:-1], conversation.computed)
        turn = Turn(prompt=len(ids))
        conversation.turns.append(turn)
        answer = Answer(len(ids))
        messages.append({"role": "assistant", "content": ""})
        yield
        for answer in client.generate(ids, conversation.salt, max_new_tokens):
            turn.ttft, turn.answered = answer.ttft, len(answer.output_ids)
            account(turn, answer.details, known)
            messages[-1]["content"] = answer.text
            yield
        conversation.computed = [*ids, *answer.output_ids[:-1]]
        turn.trace = trace_of(turn, client.restores())
        # Beside it in the pool, or measuring would evict what has just come back.
        if measure and turn.restored and len(conversation.computed) + len(ids) + ROOM < pool:
            turn.measuring = True
            yield
            turn.recompute_ttft = client.first_token(ids, f"recompute-{uuid.uuid4().hex}").ttft
    except ServerError as error:
        conversation.notice = str(error)
        if turn is None or turn.ttft is None:
            _take_back(conversation, turn)
    finally:
        if turn is not None:
            turn.measuring = False
        conversation.running = False
        conversation.used = time.monotonic()
    yield


def _take_back(conversation: Conversation, turn: Turn | None) -> None:
    """Leave the conversation as it was before a question that nothing answered."""
    if turn is not None:
        conversation.turns.remove(turn)
    while conversation.messages[-1]["role"] != "user":
        conversation.messages.pop()
    conversation.messages.pop()
