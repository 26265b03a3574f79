"""Writes data.jsonl: messages of customers of a shop that does not exist, answered in one house style.

Run `python examples/support/generate.py [PATH]`. Standard library only, one fixed seed, the same bytes every time.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 20240711
ORDERS = 300
SHARES = {"delivery": 0.22, "cancel": 0.18, "refund": 0.18, "address": 0.14, "invoice": 0.14, "person": 0.14}
INSTRUCTION = (
    "You answer for the shop Lumo. Begin with the intent in brackets: delivery, cancel, refund, address, invoice, or "
    "person for anything else. Then `Hi` and the customer's first name, and one sentence on the order with its number: "
    "delivery `order 4812 arrives on 6 May.` or, once delivered, `order 4812 was delivered on 6 May.`; cancel "
    "`order 4812 is cancelled.` while packing, else `order 4812 has left us, please send it back.`; refund "
    "`EUR 24 for order 4812 are on their way.` once delivered, else `order 4812 is refunded once it is back.`; address "
    "`order 4812 goes to the new address.` while packing, else `order 4812 has left us with the old address.`; invoice "
    "`the invoice of order 4812 over EUR 24 is attached.`; person `a colleague writes to you today.`"
)
NAMES = (
    *("Mara", "Jonas", "Aylin", "Tomas", "Ines", "Pavel", "Lucia", "Henrik", "Samira", "Otto", "Nadia", "Emil"),
    *("Rosa", "Viktor", "Leonie", "Dario", "Freya", "Marek", "Selma", "Anton", "Carla", "Yusuf", "Britta", "Niko"),
)
GOODS = (
    *("lamp", "kettle", "backpack", "desk chair", "headphones", "rain jacket", "bread knife", "picture frame"),
    *("wool blanket", "bike light", "water bottle", "alarm clock", "coffee grinder", "yoga mat", "toaster", "scarf"),
)
STATES = ("packing", "shipped", "delivered")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")

MESSAGES = {
    "delivery": (
        "Where is my {thing}?",
        "When will the {thing} get here?",
        "I am still waiting for my {thing}. Any news?",
        "Has my {thing} been delivered yet?",
        "Could you check how far along my {thing} is?",
        "On which day can I expect the {thing}?",
        "Track order {number} for me, please.",
        "What is the state of order {number}?",
    ),
    "cancel": (
        "I don't want the {thing} any more, please stop the order.",
        "Please cancel order {number}.",
        "Can I still call off the {thing}?",
        "I ordered the {thing} by mistake, take it off again.",
        "Stop order {number}, I have changed my mind.",
        "Is it too late to cancel the {thing}?",
        "I no longer need the {thing}. Cancel, please.",
        "Withdraw my order of the {thing}.",
    ),
    "refund": (
        "I want my money back for the {thing}.",
        "Please refund order {number}.",
        "The {thing} is not what I hoped for. How do I get my money?",
        "When do I get the money for the {thing}?",
        "I would like a refund for the {thing}.",
        "Pay me back for order {number}.",
        "What about my money for the {thing}?",
        "Return the price of the {thing} to my account, please.",
    ),
    "address": (
        "I have moved. Please send the {thing} to my new address.",
        "Can you change the address of order {number}?",
        "The {thing} must go to another address.",
        "I gave you the wrong street for the {thing}.",
        "Deliver order {number} to my office instead.",
        "Please correct the delivery address of my {thing}.",
        "My address has changed, what about the {thing}?",
        "Send the {thing} to my sister's place, please.",
    ),
    "invoice": (
        "I need the bill for the {thing}.",
        "Please send me the invoice of order {number}.",
        "Where do I find the receipt for the {thing}?",
        "My tax adviser wants the invoice for the {thing}.",
        "Could I have a receipt for order {number}?",
        "I can't find the bill of my {thing}.",
        "An invoice for the {thing}, please.",
        "Email me the receipt of the {thing}.",
    ),
    "person": (
        "The {thing} smells of smoke. What shall I do?",
        "Do you also sell the {thing} in green?",
        "My {thing} broke on the first day.",
        "Can I pick up a job at your warehouse?",
        "How do I clean the {thing}?",
        "Is the {thing} suitable for children?",
        "Your courier was rude to my neighbour.",
        "Can I order fifty of the {thing} for my company?",
    ),
}
OPENINGS = ("", "", "", "Hello, ", "Good morning! ", "Hi there. ", "Dear team, ")
CLOSINGS = ("", "", "", " Thanks!", " Best, {name}", " I need it soon.", " Many thanks, {name}")


@dataclass(frozen=True)
class Order:
    """What the shop knows of one order. Prices in whole euros."""

    number: int
    name: str
    thing: str
    price: int
    state: str
    day: str
    """Of delivery, expected or past."""

    @property
    def record(self) -> str:
        """As it stands before the customer's message."""
        when = "delivered on" if self.state == "delivered" else "arrives on"
        return f"Order {self.number} | {self.name} | {self.thing} | EUR {self.price} | {self.state} | {when} {self.day}"


def make_order(rng: random.Random, taken: set[int]) -> Order:
    """An order with a number of its own."""
    number = 0
    while not number or number in taken:
        number = rng.randint(1000, 9999)
    taken.add(number)
    day = f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
    return Order(number, rng.choice(NAMES), rng.choice(GOODS), rng.randint(6, 95), rng.choice(STATES), day)


def sentence(intent: str, order: Order) -> str:
    """What the shop says, by the state of the order."""
    packing, delivered = order.state == "packing", order.state == "delivered"
    said = {
        "delivery": f"was delivered on {order.day}." if delivered else f"arrives on {order.day}.",
        "cancel": "is cancelled." if packing else "has left us, please send it back.",
        "address": "goes to the new address." if packing else "has left us with the old address.",
    }
    if intent in said:
        return f"order {order.number} {said[intent]}"
    if intent == "refund":
        whole = f"EUR {order.price} for order {order.number} are on their way."
        return whole if delivered else f"order {order.number} is refunded once it is back."
    if intent == "invoice":
        return f"the invoice of order {order.number} over EUR {order.price} is attached."
    return "a colleague writes to you today."


def answer(intent: str, order: Order) -> str:
    """The whole reply in the house style."""
    return f"[{intent}] Hi {order.name}, {sentence(intent, order)}"


def message(intent: str, order: Order, rng: random.Random) -> str:
    """What the customer writes."""
    words = {"thing": order.thing, "number": order.number, "name": order.name}
    return "".join(rng.choice(part).format(**words) for part in (OPENINGS, MESSAGES[intent], CLOSINGS))


def make_rows() -> list[dict[str, str]]:
    """All rows, orders together."""
    rng = random.Random(SEED)
    taken: set[int] = set()
    rows = []
    for _ in range(ORDERS):
        order = make_order(rng, taken)
        intents: set[str] = set()
        while len(intents) < 4:
            intents.add(rng.choices(list(SHARES), list(SHARES.values()))[0])
        for intent in sorted(intents):
            rows.append(
                {
                    "context": order.record,
                    "question": message(intent, order, rng),
                    "answer": answer(intent, order),
                    "order": f"order-{order.number}",
                    "intent": intent,
                }
            )
    return rows


def main(path: Path) -> None:
    """Write the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()), encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data.jsonl")
