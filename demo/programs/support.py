"""A long support dialogue: the customer comes back after every gap, and the history with them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import sglang as sgl
from session import Session, main, options

SYSTEM = (
    "You work for the support of Northlight, a maker of bicycle lights. Be friendly, ask for one "
    "thing at a time and answer in at most two sentences."
)
MESSAGES = [
    "Hello. I bought your Northlight 700 in April and used it every day on my way to work, about "
    "forty minutes each way, half of it through the forest where there are no street lamps. For "
    "two weeks now it has been switching itself off. It starts on full brightness, and after ten "
    "minutes or so it blinks three times in red and goes dark. If I press the button it comes "
    "back for a minute. I charge it every night with the cable that came with it. What is wrong?",
    "I looked closely as you said. The ring around the button is green when I leave the house, so "
    "it does seem to be fully charged. The red blinking only begins when it is cold. This morning "
    "we had two degrees and it lasted for seven minutes; last week at twelve degrees it lasted "
    "for nearly half an hour. I have also noticed some fog behind the glass.",
    "I opened the cover of the charging port. There is a little rust on one of the four contacts, "
    "the one on the left, and the rubber seal does not lie flat any more. I may have closed it "
    "badly after a ride in heavy rain, about three weeks ago. Can I clean that by myself?",
    "I cleaned the contacts with alcohol and a cotton bud and left the light open in a warm room "
    "for two days, with a bag of rice. The fog is gone. But it went out again today, after fifteen "
    "minutes at four degrees. So it is better and not good. Is the battery damaged now?",
    "The number on the back is NL7-2204-118. I bought it at the Wheelhouse in Bergen and I have "
    "the receipt, from the ninth of April. I cannot be without a light in November, though. What "
    "would happen to my own light if I sent it in, and how long would I have to wait?",
    "That would suit me. Please send the replacement to my office: Anna Lund, Harbour Road 12, "
    "fourth floor. And do I have to put the old mount into the parcel as well, or only the light?",
    "Good. Before I go: how do I keep this from happening again with the new one?",
    "Thank you. Please sum up what we have agreed on, so that I can show it to the shop.",
]


@sgl.function
def support(s, session: Session, messages: list[str], name: str):
    s += sgl.system(SYSTEM)
    for index, message in enumerate(messages):
        s += sgl.user(message)
        s += sgl.assistant(sgl.gen(f"answer{index}", max_tokens=session.args.answer))
        if message is not messages[-1]:
            session.away(s)
    session.wait(s)


def program(session: Session) -> None:
    """One customer, from the first message to the last."""
    messages = MESSAGES[: session.args.turns]
    support.run(session=session, messages=messages, name="Anna", temperature=0)


if __name__ == "__main__":
    main(options(__doc__, answer=40, pool=1536), program)
