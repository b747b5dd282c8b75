"""The texts a profile is calibrated on when the operator gives none.

The model answers the questions below itself: what it generates is what its own KV
cache will hold in service. Long technical text that ships with Python
(``pydoc_data.topics``) is added, so that the maps also see tokens no assistant
would produce. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from krul_sglang.quality.forward import check_known, draw

OPENINGS: tuple[tuple[str, ...], ...] = (
    ("Explain how a bicycle stays upright.", "What changes at very low speed?"),
    ("Write a short story about a lighthouse keeper.", "Continue it the next morning."),
    ("Write a Python function that merges two sorted lists.", "Now add tests for it."),
    ("Plan a three day trip to a mountain village.", "It will rain. Change the plan."),
    ("What causes inflation?", "How does a central bank respond, step by step?"),
    ("I feel nervous about a job interview.", "Give me five questions they may ask."),
    ("Summarize the history of the printing press.", "Make a table of the main dates."),
    ("How do I cook lentil soup?", "Turn it into a shopping list for eight people."),
    ("Describe how photosynthesis works.", "Explain it again to a ten year old."),
    ("Write a polite email asking for a refund.", "Make it shorter and firmer."),
    ("Compare SQL and document databases.", "Which one fits a small web shop, and why?"),
    ("Tell me about the planet Jupiter.", "How large are its moons in kilometres?"),
    ("Hi! How was your weekend?", "Mine was fine, I went hiking with my sister."),
    ("Solve 3x + 7 = 25 and show the steps.", "And what about 2x^2 - 8 = 0?"),
    ("Write a poem about the sea in autumn.", "Translate the first verse to French."),
    ("What are the rules of chess?", "Explain castling and give an example."),
    ("Give me advice on learning the guitar.", "Make a practice schedule for a month."),
    ("How does public key encryption work?", "Where could an attacker still get in?"),
    ("Write a dialogue between a baker and a customer.", "Let them argue about the price."),
    ("List ten uses for an old newspaper.", "Which of them are good for a garden?"),
    ("What is the difference between a virus and a bacterium?", "Who discovered them?"),
    ("Draft a contract clause about late delivery.", "Explain it in plain words."),
    ("Recommend some books about the sea.", "What is the second one about?"),
    ("My laptop does not turn on. What should I check?", "The light blinks. And now?"),
    ("Write a scene of a play: two brothers and a lost letter.", "Add a third voice to it."),
    ("hey, are you any good at naming cats? mine is orange", "lol ok. he also bites"),
    ("Translate to Spanish: the train leaves at nine.", "Now to German, please."),
    ("Write a C function that reverses a string in place.", "Why is there no memory leak?"),
    ("Give me a JSON object that describes a library book.", "Add two authors and an address."),
    ("What did people eat in ancient Rome?", "And the poor, on an ordinary day?"),
    ("My sister and I argued about money again.", "I did say something I regret."),
    ("Write the minutes of a meeting about a new bridge.", "List the open questions."),
    ("Explain recursion with a kitchen example.", "Show it as pseudocode."),
    ("Tell me a joke about a penguin.", "Explain why it is funny."),
    ("What is the weather like on Mars?", "Could a plant survive there?"),
    ("Write a sonnet about an old coat.", "Make it rhyme less."),
    ("Give me a SQL query for the ten largest orders.", "Only those of last March."),
    ("How do I change a flat tire?", "I have no jack. What now?"),
    ("Describe your perfect city.", "Who would not like to live there?"),
    ("Pretend to be a pirate who sells insurance.", "I want to buy the cheapest one."),
    ("What is the plot of a good detective story?", "Who did it, and how is it found out?"),
    ("Write an HTML page with a list of three films.", "Style the titles in red."),
    ("Why do cats purr?", "Is it the same with tigers?"),
    ("i cant sleep. what should i think about", "that made it worse haha"),
    ("Summarize the rules of football in five points.", "What is the offside rule?"),
    ("What is a derivative in calculus?", "Differentiate x^3 - 2x + 1."),
    ("Write a letter from a soldier to his mother.", "And her answer."),
    ("Which plants grow well in the shade?", "I live near the sea."),
    ("Write a bash script that renames photos by date.", "What if two have the same date?"),
    ("Who was Marie Curie?", "What was she like as a person?"),
    ("Give me a workout for a small room.", "My knees hurt. Change it."),
    ("What are the pros and cons of nuclear power?", "Which of them is most disputed?"),
    ("Write the first page of a fantasy novel.", "Continue from the dragon's view."),
    ("Name some classical composers and their works.", "Which one should I hear first?"),
    ("Explain a mortgage to someone of eighteen.", "What if rates go up?"),
    ("Write a product description for a wooden lamp.", "Now as a complaint about it."),
    ("What is a black hole?", "What would I see while falling in?"),
    ("Write regular expressions for dates and e-mails.", "Explain the second one."),
    ("Make a quiz about rivers.", "Give the answers, with a fact for each."),
    ("How is cheese made?", "Why do some have holes?"),
    ("Speak like Shakespeare about my broken phone.", "Now like a news reporter."),
    ("What should I pack for a week in Iceland?", "And with a baby?"),
    ("Write a dialogue on whether machines can think.", "Let the sceptic win."),
    ("List the planets with their sizes in a table.", "Add the number of moons."),
)


def technical_texts(count: int, chars: int = 8000) -> list[str]:
    """``count`` long excerpts of the Python language reference, the longest topics first."""
    from pydoc_data.topics import topics

    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))
    return [topics[name][:chars] for name in longest[:count]]


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]], answer: bool) -> list[int]:
    """Token ids of a conversation, through the chat template where there is one.

    answer: end with the opening of an assistant turn.
    """
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=answer, return_dict=True
        )
        return list(encoded["input_ids"])
    text = "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
    return list(tokenizer(text + ("\n\nassistant:" if answer else ""))["input_ids"])


@torch.no_grad()
def generate_conversations(
    model: Any,
    tokenizer: Any,
    count: int,
    answer_tokens: int,
    on_step: Callable[[float], None] | None = None,
) -> list[list[dict[str, str]]]:
    """``count`` conversations: a question, the answer sampled from ``model``, the next question.

    answer_tokens: longest answer. on_step: called with the fraction done. One answer
    a conversation: a decoding step's time grows with what is cached, and the end of one
    conversation is followed by the next one anyway. All are generated together: what a step
    reads of the weights is then read for all of them.
    """
    openings = [OPENINGS[i % len(OPENINGS)] for i in range(count)]
    chats = [[{"role": "user", "content": question}] for question, _ in openings]
    rows = [chat_ids(tokenizer, chat, answer=True) for chat in chats]
    answers = _sample(model, tokenizer, rows, answer_tokens, on_step or (lambda done: None))
    for chat, answer, (_, following) in zip(chats, answers, openings, strict=True):
        chat.append({"role": "assistant", "content": answer})
        chat.append({"role": "user", "content": following})
    return chats


def _sample(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    limit: int,
    on_step: Callable[[float], None],
) -> list[str]:
    """One sampled continuation per row, all rows in one left-padded batch.

    From the whole distribution: maps fitted on text of a lower temperature fit people's
    text worse (at ten times less, half as much divergence again).
    """
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        check_known(model, [*row, pad])
        ids[i, width - len(row) :] = torch.tensor(list(row))
        mask[i, width - len(row) :] = 1
    generator = torch.Generator().manual_seed(0)

    def only_drawn(so_far: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        on_step((so_far.shape[1] - width + 1) / limit)
        chosen = torch.full_like(logits, -torch.inf)
        return chosen.scatter_(1, draw(logits, generator), 0.0)

    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        logits_processor=[only_drawn],
        max_new_tokens=limit,
        pad_token_id=pad,
    )
    return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in out]
