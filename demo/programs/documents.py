"""Questions about a document: it is read once, and each later question finds it read."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import sglang as sgl
from session import ProgramError, Session, main, options

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "how_it_works.md"
QUESTIONS = [
    "What happens to a conversation's tokens when they leave the device?",
    "How is it decided how much of a history is loaded?",
    "What if a byte of what is stored is damaged?",
    "What do other conversations share, and how is that stored?",
    "Sum the document up in one sentence.",
]


@sgl.function
def ask(s, session: Session, document: str, questions: list[str], name: str):
    s += sgl.system("You answer questions about a document. Answer in one sentence.")
    s += sgl.user(f"The document:\n\n{document}\n\nMy first question: {questions[0]}")
    for index, question in enumerate(questions):
        if index:
            session.away(s)
            s += sgl.user(question)
        s += sgl.assistant(sgl.gen(f"answer{index}", max_tokens=session.args.answer))
    session.wait(s)


def program(session: Session) -> None:
    """One reader and one document."""
    args = session.args
    try:
        words = args.document.read_text(encoding="utf-8").split(" ")
    except (OSError, UnicodeDecodeError) as error:
        raise ProgramError(f"--document {args.document}: cannot be read ({error})") from None
    document = " ".join(words[: args.words])
    questions = QUESTIONS[: args.turns]
    name = args.document.name
    ask.run(session=session, document=document, questions=questions, name=name, temperature=0)


if __name__ == "__main__":
    parser = options(__doc__, answer=32, pool=2560)
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="a text file")
    parser.add_argument("--words", type=int, default=900, help="how much of it is read")
    main(parser, program)
