"""Writes data.jsonl: shift reports of a small plant that does not exist, each with a summary in one house style.

A report has facts that matter (what happened, what it cost, what was decided, who does what next), an option that was
turned down, and routine that does not matter, in an order that varies. Report and summary draw their words apart.

Run `python examples/summaries/generate.py [PATH]`. Standard library only, one fixed seed, the same bytes every time.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 20261201
REPORTS = 320
QUESTION = "Summarize this shift report."
INSTRUCTION = (
    "Summarize the shift report in one line, in the house style: the place, what happened there and what was lost, "
    "then the decision that was taken, then who has to do what by when. For example: `Line 3: broken pump; 120 bottles "
    "lost. Decision: run at half speed. Next: Mara Lind to call the supplier by 6 May.` Leave out everything else."
)
PEOPLE = (
    *("Mara Lind", "Jonas Weber", "Aylin Demir", "Tomas Novak", "Ines Duarte", "Pavel Horak", "Lucia Ferri"),
    *("Henrik Dahl", "Samira Aziz", "Otto Brandt", "Nadia Popov", "Emil Larsen", "Rosa Vidal", "Viktor Szabo"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = ("March", "April", "May", "June", "September", "October", "November")
SHIFTS = {"early": range(6, 14), "late": range(14, 22), "night": (22, 23, 0, 1, 2, 3, 4, 5)}
"""Name and hours."""
Wordings = tuple[str, ...]


@dataclass(frozen=True)
class Incident:
    """What can happen. Each tuple of wordings says one thing in several ways; the first two are also for summaries."""

    places: Wordings
    happened: Wordings
    """Sentences of a report; {place}, {time}."""
    brief: Wordings
    """What a summary calls it."""
    unit: str
    """What is lost."""
    options: tuple[Wordings, ...]
    """What can be decided, as infinitives."""
    steps: tuple[Wordings, ...]
    """What can be done next, as infinitives."""


INCIDENTS = (
    Incident(
        ("Line 1", "Line 2", "Line 3", "Line 4"),
        (
            "At {time} the conveyor of {place} came to a stop because its belt had torn.",
            "{place} stood still from {time} on: the belt of the conveyor was torn.",
            "The conveyor belt of {place} tore at {time}, and nothing moved any more.",
        ),
        ("torn conveyor belt", "conveyor belt torn"),
        "bottles",
        (
            ("change the belt at night", "replace the belt in the night shift"),
            ("move the orders to another line", "run the orders on another line"),
            ("patch the belt for now", "mend the belt until a new one arrives"),
        ),
        (
            ("order two spare belts", "buy two belts as spares"),
            ("check the belts of all lines", "inspect the belts on every line"),
        ),
    ),
    Incident(
        ("Oven A", "Oven B", "Oven C"),
        (
            "{place} became too hot at {time}, and what was inside was burnt.",
            "At {time} the temperature of {place} rose far above the setting.",
            "From {time} on {place} was much hotter than it should have been.",
        ),
        ("overheated", "too hot"),
        "loaves",
        (
            ("bake at a lower setting", "lower the setting of the oven"),
            ("keep the oven off", "leave the oven switched off"),
            ("bake in the other ovens", "use the other ovens"),
        ),
        (
            ("replace the sensor", "put in a new sensor"),
            ("call the maker of the oven", "phone the oven's maker"),
        ),
    ),
    Incident(
        ("Gate 1", "Gate 2", "Gate 5", "Gate 7"),
        (
            "A truck hit the ramp of {place} at {time} while it was backing up.",
            "At {time} the ramp at {place} was hit by a truck.",
            "While backing up at {time} a truck ran into the ramp of {place}.",
        ),
        ("truck hit the ramp", "ramp hit by a truck"),
        "pallets",
        (
            ("close the gate", "keep the gate shut"),
            ("unload by hand", "do the unloading by hand"),
            ("send trucks to the yard", "let trucks unload in the yard"),
        ),
        (
            ("report it to the insurer", "write to the insurance"),
            ("get an offer for the repair", "ask for a price for the repair"),
        ),
    ),
    Incident(
        ("Cold store 1", "Cold store 2", "Cold store 3"),
        (
            "The cooling of {place} failed at {time}, and it was noticed late.",
            "At {time} {place} lost its cooling.",
            "{place} had no cooling from {time} on.",
        ),
        ("cooling failed", "no cooling"),
        "boxes",
        (
            ("rent a cooling truck", "hire a truck with cooling"),
            ("sell the goods at half price", "give half off on the goods"),
            ("move the goods to the other store", "carry the goods over to the other store"),
        ),
        (
            ("install an alarm", "have an alarm put in"),
            ("have the compressor repaired", "get the compressor fixed"),
        ),
    ),
    Incident(
        ("Printer 1", "Printer 2", "Printer 3"),
        (
            "{place} put the wrong date on the labels, which was seen at {time}.",
            "At {time} we saw that the labels of {place} had a wrong date.",
            "The date on the labels from {place} was wrong, as a check at {time} showed.",
        ),
        ("wrong date on labels", "labels with a wrong date"),
        "labels",
        (
            ("print the labels again", "make new labels"),
            ("correct the labels by hand", "fix the dates by hand"),
            ("stop the delivery", "hold back the delivery"),
        ),
        (
            ("update the software", "bring the software up to date"),
            ("write a checklist", "draw up a checklist"),
        ),
    ),
    Incident(
        ("Tank 3", "Tank 4", "Tank 6", "Tank 8"),
        (
            "{place} was leaking at {time}: a valve had not closed.",
            "At {time} a valve of {place} stayed open and it ran out.",
            "Because of an open valve {place} was losing its content at {time}.",
        ),
        ("leaking valve", "valve leaked"),
        "liters",
        (
            ("empty the tank", "drain the tank"),
            ("use the spare tank", "switch to the spare tank"),
            ("fill the tank by half only", "fill only half of the tank"),
        ),
        (
            ("replace the valve", "put in a new valve"),
            ("train the night shift", "give the night shift a training"),
        ),
    ),
)
COSTS = ("{count} {unit} were lost.", "That cost us {count} {unit}.", "We had to write off {count} {unit}.")
DECIDED = (
    "The team leaders agreed to {chosen}. The idea to {other} was turned down.",
    "Somebody proposed to {other}, but in the end we decided to {chosen}.",
    "We first wanted to {other}. At the meeting it was decided to {chosen} instead.",
)
NEXT = (
    "{person} will {step} by {date}.",
    "{person} has promised to {step} by {date}.",
    "It is now up to {person} to {step} by {date}.",
)
ROUTINE = (
    "{count} people were on the shift, and {person} came in for a colleague who was ill.",
    "The canteen had run out of coffee by {time}.",
    "A group of {count} visitors was shown around by {person}.",
    "The weekly cleaning was finished at {time}, earlier than planned.",
    "{person} has been with us for {count} years and brought a cake.",
    "The delivery of packaging came at {time} and was complete.",
    "We counted the stock of gloves: {count} pairs are left.",
    "The new lamps in the hall are much brighter, as {person} remarked.",
    "The fire drill took {count} minutes and went well.",
    "Parking is still difficult because of the building site next door.",
    "{person} asks everybody to hand in the time sheets by {date}.",
    "It rained the whole night, but the roof kept dry this time.",
    "The forklift was charged and washed at {time}.",
    "The radio in the break room works again, thanks to {person}.",
)


@dataclass(frozen=True)
class Facts:
    """What a summary has to say. Wordings are drawn where a text is written."""

    shift: str
    incident: Incident
    place: str
    count: int
    chosen: Wordings
    other: Wordings
    person: str
    step: Wordings
    date: str


def draw_facts(rng: random.Random) -> Facts:
    """The facts of one report."""
    incident = rng.choice(INCIDENTS)
    chosen, other = rng.sample(incident.options, 2)
    date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
    person_and_step = rng.choice(PEOPLE), rng.choice(incident.steps)
    shift, place = rng.choice(tuple(SHIFTS)), rng.choice(incident.places)
    return Facts(shift, incident, place, rng.randint(4, 90) * 5, chosen, other, *person_and_step, date)


def draw_time(rng: random.Random, shift: str) -> str:
    """A time of a shift."""
    return f"{rng.choice(SHIFTS[shift]):02d}:{rng.randint(0, 11) * 5:02d}"


def write_routine(rng: random.Random, facts: Facts) -> list[str]:
    """Sentences that do not matter, with people, numbers and dates of their own."""
    people = [person for person in PEOPLE if person != facts.person]
    return [
        text.format(
            count=rng.randint(6, 40),
            person=rng.choice(people),
            time=draw_time(rng, facts.shift),
            date=f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        )
        for text in rng.sample(ROUTINE, 5)
    ]


def write_report(rng: random.Random, facts: Facts) -> str:
    """Four paragraphs: the head, what happened, and two of routine, in any order but for the head."""
    routine = write_routine(rng, facts)
    happened = rng.choice(facts.incident.happened).format(place=facts.place, time=draw_time(rng, facts.shift))
    cost = rng.choice(COSTS).format(count=facts.count, unit=facts.incident.unit)
    decided = rng.choice(DECIDED).format(chosen=rng.choice(facts.chosen), other=rng.choice(facts.other))
    step = rng.choice(NEXT).format(person=facts.person, step=rng.choice(facts.step), date=facts.date)
    # what follows from what happened stands behind it, with something else between
    paragraphs = [f"{happened} {cost} {routine[0]}", f"{routine[1]} {decided} {step}"]
    paragraphs.insert(rng.randint(0, 2), " ".join(routine[2:]))
    head = f"Shift report, {rng.choice(DAYS)}, {facts.shift} shift."
    return "\n\n".join([head, *paragraphs])


def write_summary(rng: random.Random, facts: Facts) -> str:
    """One line in the house style."""
    brief, chosen, step = (rng.choice(words) for words in (facts.incident.brief, facts.chosen, facts.step))
    lost = f"{facts.count} {facts.incident.unit} lost"
    return f"{facts.place}: {brief}; {lost}. Decision: {chosen}. Next: {facts.person} to {step} by {facts.date}."


def make_rows() -> list[dict[str, str]]:
    """All rows."""
    rng = random.Random(SEED)
    drawn = (draw_facts(rng) for _ in range(REPORTS))
    return [
        {"context": write_report(rng, facts), "question": QUESTION, "answer": write_summary(rng, facts)}
        for facts in drawn
    ]


def main(path: Path) -> None:
    """Write the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()), encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data.jsonl")
