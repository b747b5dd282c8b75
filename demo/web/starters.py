"""The conversations a visitor finds: each about a document, so that its history is long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Starter:
    """A title, what the first message carries along, and questions to begin with."""

    title: str
    document: str
    questions: tuple[str, ...]


LOG = """\
From the log of the Varnes Point lighthouse, November 1911.

3 November. Wind north-east, moderate. Trimmed the lamp at dusk. The supply boat Marta came at \
noon with oil, two sacks of flour and letters. Captain Holm says the herring are late this year \
and the harbour at Sund is half empty. Mended the railing of the upper gallery.

4 November. Fog from six in the morning until past three. Rang the bell every two minutes, \
Ingrid and I by turns. A steamer answered four times from the south, then was silent. We heard \
no more of her, and I fear we will read of her in the newspaper.

5 November. Clear and cold. From the gallery we saw the steamer aground on the Crow Bank, \
upright, smoke from her funnel. I lit the signal for the lifeboat. By two o'clock eleven men \
were off her. Her master, a Mr. Aske, slept in our kitchen and ate a whole loaf. She carries \
timber from Arkhangelsk for Leith.

6 November. The tide lifted the steamer at half past four and she floated free with a tug on \
each side. Mr. Aske left his barometer with us as thanks. It hangs beside the stove and has been \
falling since noon.

7 November. Storm from the west, the worst since we came here. Spray over the lamp room. One \
pane of the lantern cracked at nine in the evening; I set the brass shutter behind it. The light \
did not fail. Ingrid read to me from Mr. Aske's almanac to keep me awake.

8 November. Wind falling. The boathouse door is gone and so are nine hens. Wrote to the Board \
for one pane of lantern glass, a door and, if the Board will, nine hens.
"""

BREAD = """\
Notebook of a small bakery: the dark rye loaf, as we make it on a Friday.

Evening before. Mix 300 g of ripe rye starter with 600 g of coarse rye flour and 600 g of water \
at 40 degrees. Cover it and leave it near the oven. It is ready after ten to twelve hours, when \
it smells of apples and its top has begun to crack. If the kitchen is cold, give it two hours \
more, not warmer water.

Also in the evening, pour 250 g of boiling water over 150 g of sunflower seeds, 50 g of linseed \
and 24 g of salt. The salt goes in here, not into the dough, so that the seeds take it up.

Morning. Add 500 g of medium rye flour, 200 g of wheat flour, the seeds with their water, 30 g \
of dark malt syrup and 150 g of warm water. Stir for six minutes. The dough is a heavy paste; do \
not knead it and do not add flour because it sticks. Wet hands are enough.

Divide it between three tins of one litre, smooth the top with a wet spoon and sprinkle it with \
coarse flour. Let it rise for 90 minutes, until the flour shows cracks as wide as a finger nail.

Bake for 15 minutes at 250 degrees with steam, then for 55 minutes at 190 degrees without. The \
loaf is done at 97 degrees inside. Take it out of the tin for the last five minutes if the sides \
are pale.

Do not cut it on the same day. It keeps for eight days in a cloth and is best on the third. Last \
week's mistake: the timer was set to 35 minutes instead of 55, and the crumb was wet in the \
middle. We toasted those loaves and sold them as crispbread.
"""

SUPPORT = """\
Manual of the Kestrel P2 label printer, chapter 4: when something is wrong.

The light is steady green: the printer is ready. Slow green: it is warming up, for at most forty \
seconds. Steady amber: the roll is nearly empty, about twelve labels are left. Fast amber: the \
cover is open or its left latch is not closed. Red: the print head is too hot; wait four \
minutes, the printer goes on by itself. Red and amber in turns: the ribbon is torn or used up.

Labels come out blank. Check that the coated side of the roll faces up: a coin leaves a grey \
line on it. If it does, set the darkness to 7 in the menu under Print, Quality. Darkness 9 and \
10 shorten the life of the head and are meant for cloth labels only.

Labels are cut in the wrong place. Hold the feed button for three seconds. The printer measures \
two labels and stores their length. Repeat this whenever another size is loaded.

The computer does not find the printer. On a cable: use the port marked with a square, the round \
one is for service. On a network: print the status page by pressing feed and power together, and \
compare the address on it with the one the computer uses. The printer forgets its address when \
it has been without power for more than ten days.

The print is pale on one side. Clean the head with the blue pen from the accessory box, from the \
middle outwards, after the printer has been off for ten minutes. If it stays pale, turn the \
white screw under the cover a quarter turn clockwise. Never more than one full turn.

Service: have the serial number ready, it is under the roll. The warranty is three years for the \
printer and one year, or thirty kilometres of labels, for the head.
"""

STARTERS = (
    Starter(
        "Lighthouse log",
        LOG,
        (
            "What happened to the steamer?",
            "What did Mr. Aske leave behind?",
            "What was lost in the storm?",
            "Which day was the most dangerous, and why?",
            "Write two sentences that Ingrid might have added.",
        ),
    ),
    Starter(
        "Rye bread",
        BREAD,
        (
            "When does the salt go in?",
            "How do I know that the loaf is done?",
            "What went wrong last week?",
            "My kitchen is cold. What do I change?",
            "Write the shopping list.",
        ),
    ),
    Starter(
        "Printer support",
        SUPPORT,
        (
            "My printer shows a red light. What should I do?",
            "The labels come out blank.",
            "How do I tell it that I loaded another size?",
            "Is the print head still under warranty after two years?",
            "Sum up what we have tried.",
        ),
    ),
)
