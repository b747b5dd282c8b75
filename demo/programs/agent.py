"""An agent that works through a task with tools: while a tool runs, the agent's KV is idle, and
others take the device. Each step continues the whole history."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import sglang as sgl
from session import Session, main, options

ORDERS: dict[str, dict[str, Any]] = {
    "A-1042": {"item": "lamp", "count": 3, "customer": "Lund", "paid": True},
    "A-1043": {"item": "mount", "count": 10, "customer": "Berg", "paid": False},
    "A-1044": {"item": "cable", "count": 1, "customer": "Lund", "paid": True},
}
STOCK = {"lamp": 2, "mount": 250, "cable": 0}
PRICES = {"lamp": 89.0, "mount": 12.5, "cable": 9.0}

SYSTEM = """You are the back office of a bicycle shop. You work step by step. In every step you call
one tool, as one line of JSON, and wait for its result. The tools:
- order: everything known of an order, such as A-1042
- stock: how many of an item are in the warehouse: lamp, mount or cable
- price: what one item costs, in euros
- ship: send an order; refused where it is not paid or the stock does not suffice
- note: leave a note to the person in charge, about an order
When all orders are settled, say in one sentence what was done with each of them."""
TASK = (
    "Three orders came in over night: A-1042, A-1043 and A-1044. Find out for each whether it is "
    "paid and whether the stock suffices, ship what can be shipped, and leave a note on what "
    "cannot, with what it is worth. Take them in this order."
)
CALL = r'\{"tool": "(order|stock|price|ship|note)", "of": "(A-104[234]|lamp|mount|cable)"\}'


def use(tool: str, of: str) -> str:
    """What a tool answers, a line of JSON."""
    order = ORDERS.get(of)
    match tool:
        case "order":
            answer = order or {"error": f"no order is called {of}"}
        case "stock":
            answer = {"in_stock": STOCK[of]} if of in STOCK else {"error": f"no item: {of}"}
        case "price":
            answer = {"euros": PRICES[of]} if of in PRICES else {"error": f"no item: {of}"}
        case "ship" if order is not None:
            short = STOCK[str(order["item"])] < int(order["count"])
            refused = "not paid" if not order["paid"] else "not enough in stock" if short else None
            answer = {"refused": refused} if refused else {"shipped": of}
        case "note" if order is not None:
            answer = {"noted": f"{order['count']} x {order['item']} for {order['customer']}"}
        case _:
            answer = {"error": f"{of} is no order"}
    return json.dumps(answer)


@sgl.function
def agent(s, session: Session, steps: int, name: str):
    s += sgl.system(SYSTEM)
    s += sgl.user(TASK)
    for step in range(steps):
        # The grammar leaves a small model no way to write something that is no call.
        s += sgl.assistant(sgl.gen(f"call{step}", max_tokens=48, regex=CALL))
        session.away(s)  # the tool takes its time
        call = json.loads(s[f"call{step}"])
        s += sgl.user(f"The tool's result: {use(call['tool'], call['of'])}")
    s += sgl.user("The time is up. What was done with each order?")
    s += sgl.assistant(sgl.gen("report", max_tokens=session.args.answer))
    session.wait(s)


def program(session: Session) -> None:
    """As many steps as ``--turns`` says, and the report."""
    steps = max(1, (session.args.turns or 7) - 1)
    agent.run(session=session, steps=steps, name="agent", temperature=0)


if __name__ == "__main__":
    main(options(__doc__, answer=40, pool=1024), program)
