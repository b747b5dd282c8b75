"""A role-play with branches: one story is told on in three ways, and the reader goes back and
forth between them. What they share is stored once, and exactly."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import sglang as sgl
from session import Session, main, options

SYSTEM = (
    "You tell a story together with the reader, who plays Mira. You play everyone else. Write two "
    "or three sentences at a time, in the present tense, and never speak for Mira."
)
OPENING = [
    "The story: it is the last night of the harvest fair in Old Weir, a town on an island in a "
    "slow brown river. The ferry stopped at dusk because of the fog. Mira, a mapmaker's "
    "apprentice of nineteen, has come to find Tobin, the lock keeper, who sent her master half of "
    "a map and then nothing for a month. She wears a grey coat with deep pockets, she has six "
    "coins, a lamp, a compass that points a little west of north, and the half map. The inn is "
    "called the Drowned Bell. Its keeper, Oda, is tall, speaks little and misses nothing. In the "
    "corner sits a man with a wet hat who has been watching the door. Begin when Mira comes in.",
    "I shake the fog from my coat, go straight to the bar and put one coin on it. 'Something hot,' "
    "I say to Oda, quietly, 'and tell me where I find Tobin, the lock keeper.'",
]
BRANCHES = {
    "cellar": [
        "I nod, finish my cup and follow Oda down the stairs into the cellar, lamp in hand.",
        "I hold the half map against the one that is painted on the wall, and look for the join.",
    ],
    "stranger": [
        "I take my cup, sit down opposite the man with the wet hat and say nothing at all.",
        "I lay the compass on the table between us and watch his face while the needle settles.",
    ],
    "river": [
        "I leave by the back door and walk along the river towards the lock, lamp unlit.",
        "I step into the boat that is tied up there, and feel under the seat for what was left.",
    ],
}


@sgl.function
def story(s, session: Session, turns: int, name: str):
    answer = sgl.gen(max_tokens=session.args.answer)
    s += sgl.system(SYSTEM)
    for line in OPENING:
        s += sgl.user(line)
        s += sgl.assistant(answer)
        session.away(s)
    branches = s.fork(len(BRANCHES))
    for branch, path in zip(branches, BRANCHES, strict=True):
        session.endpoint.name(branch, path)
    # The reader tries all three, one step each in turn.
    for step in range(turns):
        for branch, lines in zip(branches, BRANCHES.values(), strict=True):
            branch += sgl.user(lines[step])
            branch += sgl.assistant(answer)
            session.away(branch)


def program(session: Session) -> None:
    """The opening, and each branch told on."""
    longest = max(map(len, BRANCHES.values()))
    turns = min(longest, session.args.turns or longest)
    story.run(session=session, turns=turns, name="opening", temperature=0)


if __name__ == "__main__":
    main(options(__doc__, answer=48, pool=1280), program)
