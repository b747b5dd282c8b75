"""A crowd: users who each think between their turns, too many for the device to hold them all.
Whoever answers finds out whether their history was still there."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import sglang as sgl
from session import ProgramError, Session, main, options

TOPICS = {
    "a garden": "a narrow garden behind the house, with clay soil, shade until noon and a wall",
    "a journey": "ten days by train through three countries, with two children and little luggage",
    "a talk": "a talk of twenty minutes about sleep, for an audience that works in shifts",
    "a bicycle": "an old steel bicycle with a bent fork, a loose chain and a good saddle",
    "a dinner": "a dinner for eight people, two of whom eat no meat and one of whom eats no nuts",
    "a letter": "a letter to the landlord about a cold room, a loud pipe and a rent that rose",
    "a race": "a first half marathon in spring, after a winter with a sore knee and much work",
    "a shelf": "a bookshelf for a crooked wall, two metres wide, that takes four hundred books",
}
MOODS = ("I have little time", "I have never done it", "I must not spend much", "I want it to last")
NEXT = [
    "That is a start. What is the first thing that could go wrong with it, and how would I notice?",
    "And if I had only half of the time, what would you leave out?",
    "Thank you. Put it all into a list of five short lines.",
]


@sgl.function
def user(s, session: Session, first: str, waits: list[float], name: str):
    s += sgl.system("You are a helpful assistant. Answer briefly and to the point.")
    for index, wait in enumerate(waits):
        session.think(wait)
        s += sgl.user(NEXT[index - 1] if index else first)
        s += sgl.assistant(sgl.gen(f"answer{index}", max_tokens=session.args.answer))
        session.wait(s)


def program(session: Session) -> None:
    """All users at once; their thinking times are the same in every run."""
    args, rng = session.args, random.Random(3)
    if args.users < 1 or args.think < 0:
        raise ProgramError("--users must be at least 1, --think at least 0")
    turns = min(args.turns or len(NEXT) + 1, len(NEXT) + 1)
    users = []
    for number in range(args.users):
        topic = list(TOPICS)[number % len(TOPICS)]
        mood = MOODS[number // len(TOPICS) % len(MOODS)]
        first = (
            f"Help me with {topic}. To be exact, it is {TOPICS[topic]}. {mood}, and I am user "
            f"number {number}, so please do not give me the answer that everybody gets. Ask me "
            "nothing back; make a guess where you do not know, tell me that it is one, and give me "
            "a plan with what to do today, what to do this week and what to leave for later."
        )
        # The first ones do not all come at the same moment either.
        waits = [args.think * rng.expovariate(1) for _ in range(turns)]
        users.append({"session": session, "first": first, "waits": waits, "name": f"user {number}"})
    user.run_batch(users, temperature=0, num_threads=args.users)


if __name__ == "__main__":
    parser = options(__doc__, answer=16, pool=1536)
    parser.add_argument("--users", type=int, default=32, help="how many there are")
    parser.add_argument("--think", type=float, default=20, help="mean seconds between turns")
    main(parser, program, together=True)
