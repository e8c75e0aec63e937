"""Generate the rows of `train.jsonl` and `held_out.jsonl` from tables of phrasings and values.

The task is to answer a request in everyday English with one line of JSON that calls a function with its arguments.

    wake me at 06:45 for yoga
    {"function": "set_alarm", "arguments": {"time": "06:45", "label": "yoga"}}

The answer has an argument if and only if the request names it. The held-out rows take every free value (names,
places, times, amounts, texts, ...) from a fifth of its pool that no training row uses, and a quarter of them use
phrasings that no training row uses. The generator writes the same bytes on every machine.

    python -m sftx.demo.generate [DIR]      # writes the two files, by default into the directory of this module
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random
from typing import Literal, TypeVar

Split = Literal["train", "held_out"]
Value = str | int | float
Row = dict[str, list[dict[str, str]]]
T = TypeVar("T")

NUM_ROWS: dict[Split, int] = {"train": 1000, "held_out": 200}
HELD_OUT_FRACTION = 0.2  # of every pool of free values
NEW_PHRASING_EVERY = 4  # every fourth held-out row of a function uses a phrasing that is unknown in training


def words(text: str) -> tuple[str, ...]:
    """Return the comma-separated entries of a table."""
    return tuple(entry.strip() for entry in text.split(","))


def table(text: str) -> list[str]:
    """Return the entries of every line, and for a line with columns (+) every combination of their entries."""
    lines = [product(*map(words, line.split("+"))) for line in text.strip().rstrip(",").split(",\n")]
    return [" ".join(entries) for line in lines for entries in line]


# Arguments with few values; every value occurs in both splits. Each value has the list of its wordings.
CURRENCIES = {"USD": ["dollars"], "EUR": ["euros"], "GBP": ["pounds"], "JPY": ["yen"], "CHF": ["francs"]}
WEEKDAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
CLOSED: dict[str, dict[str, list[str]]] = {
    "day": {"today": ["today"], "tomorrow": ["tomorrow"]} | {day: [f"on {day}", f"this {day}"] for day in WEEKDAYS},
    "state": {"on": ["on"], "off": ["off"]},
    "currency": CURRENCIES,
    "source": CURRENCIES,
    "target": CURRENCIES,
}
# Arguments with many values; no value occurs in both splits. A request has them literally.
FREE: dict[str, Sequence[Value]] = {
    "time": [f"{hour:02}:{minute:02}" for hour in range(5, 23) for minute in range(0, 60, 5)],
    "minutes": range(2, 121),
    "brightness": range(1, 101),
    "amount": range(12, 1000),
    "to": table("""
        Adam, Alex, Alice, Andrew, Anna, Anne, Arthur, Ben, Bill, Bob, Carl, Charles, Chris, Clara, Dan, Daniel,
        David, Edward, Emily, Emma, Frank, Fred, George, Grace, Henry, Jack, Jacob, James, Jane, Jim, John, Joseph,
        Julia, Kate, Kim, Laura, Leo, Lina, Louis, Luke, Maria, Mark, Martin, Mary, Max, Mia, Nick, Nina, Noah, Paul,
        Peter, Ray, Robert, Rosa, Sam, Sara, Sarah, Simon, Thomas, Tim, Tom, Victor, William, Zoe"""),
    "city": table("""
        Amsterdam, Athens, Austin, Berlin, Boston, Brussels, Cairo, Cambridge, Chicago, Cologne, Detroit,
        Geneva, Hamburg, Istanbul, Jackson, Lagos, Lincoln, London, Lyon, Madison, Madrid,
        Manila, Memphis, Miami, Montreal, Moscow, Mumbai, Nairobi, Naples, Orlando, Oslo, Oxford, Paris, Perth,
        Portland, Porto, Quebec, Rome, Salem, Seattle, Seoul, Singapore, Stockholm, Tokyo, Toronto, Turin,
        Vancouver, Venice, Vienna, Windsor, York"""),
    "room": table("""
        kitchen, bedroom, hallway, garage, office, bathroom, attic, basement, porch, study, library, studio,
        workshop, playroom, pantry, lobby, gym, greenhouse,
        living, dining, guest, music, meeting, waiting, storage + room"""),
    "label": table("""
        yoga, school, work, breakfast, swimming, church, rowing, fishing, hiking, running, baking, medicine,
        football, piano, band, weight + training,
        dance, language, cooking, drawing, morning, evening + class"""),
    "name": table("""
        pasta, rice, tea, bread, soup, cake, roast, stew, pizza, dryer, sauna, workout, nap, pie, chicken, broth,
        dough, beans, jam, fish, face mask, hair dye, glue, quiz, debate, speech, homework, chess game,
        washing machine, pudding, gravy, steak"""),
    "task": table("""
        call, email, visit, thank, pay + the dentist, the landlord, the vet, the baker, the school,
        buy, order, pick up, return + stamps, new shoes, cat food, printer paper, train tickets,
        clean, check, repair, open + the oven, the fridge, the printer, the window, the garage"""),
    "text": table("""
        I will, we will + be late, bring dessert, wait at the gate, cook tonight, take the next train,
        I will, we will + be home early, stay at the hotel, meet you outside, call after work,
        the parcel, the food, the car, the cake, your coat + is ready, has arrived, is on the way,
        the meeting, the party, the lesson, the match + is cancelled, starts early, has moved, went well"""),
    "song": table("Silver, Golden, Paper, Winter, Summer, Happy + River, Morning, Road, Rain, Garden, Stars"),
    "artist": table("Blue, Little, Northern, Electric, Black + Sisters, Engine, Harbor, Birds, Brothers, Band"),
    "note": table("birthday, concert, holiday, dinner, train, team + gift, tickets, bill, trip, fees"),
    "title": table("budget, design, project, family, team, music + meeting, lunch, workshop, party, review"),
    "place": table("north, old, city, river, central + library, museum, station, market, hospital, theater"),
}

# Each function has its arguments in the order of the answer, then its phrasings; + marks those of held-out rows only.
# A phrasing that starts with a small letter is a command and gets an opening; the others are used unchanged.
OPENINGS = ("{}", "{}", "please {}", "Hey, {}.", "Can you {}?", "Could you please {}?", "I want you to {}.")
PHRASINGS = """
set_alarm(time, label)
    set an alarm for {time}
    wake me up at {time}
    get me up at {time}
    wake me at {time} for {label}
    set an alarm for {time} and call it {label}
    set an alarm at {time} for {label}
    At {time} I have {label}, wake me up.
    + make sure that I am awake at {time}
    + I need an alarm at {time} for {label}.
set_timer(name, minutes)
    set a timer of {minutes} minutes for the {name}
    set the {name} timer to {minutes} minutes
    start a timer for the {name}, {minutes} minutes
    time the {name} for {minutes} minutes
    The {name} needs {minutes} minutes, start a timer.
    + start the {name} timer with {minutes} minutes
    + I need a timer for the {name}, {minutes} minutes.
add_reminder(task, day, time)
    remind me to {task} {day}
    remind me {day} to {task}
    Don't let me forget to {task} {day}.
    remind me to {task} {day} at {time}
    remind me {day} at {time} to {task}
    I have to {task} {day} at {time}, remind me.
    + I must not forget to {task} {day}, remind me.
    + remind me that I have to {task} {day} at {time}
send_message(to, text)
    tell {to} that {text}
    let {to} know that {text}
    text {to} that {text}
    send {to} a message saying {text}
    send a message to {to}: {text}
    Message for {to}: {text}
    + inform {to} that {text}
    + write to {to} that {text}
get_weather(city, day)
    What is the weather in {city}?
    How is the weather in {city}?
    show me the forecast for {city}
    What will the weather be like in {city} {day}?
    Will it rain in {city} {day}?
    Do I need an umbrella in {city} {day}?
    check the weather in {city} {day}
    I am in {city} {day}, how will the weather be?
    + Is it going to snow in {city} {day}?
    + tell me the weather in {city}
play_music(song, artist)
    play {song} by {artist}
    play the song {song} by {artist}
    put on {song} by {artist}
    I would like to hear {song} by {artist}.
    I want to listen to {song} by {artist}.
    + let me hear {song} by {artist}
    + I feel like hearing {song} by {artist}.
set_light(room, state, brightness)
    turn {state} the lights in the {room}
    turn the {room} lights {state}
    switch {state} the light in the {room}
    set the {room} lights to {brightness} percent
    dim the lights in the {room} to {brightness} percent
    I want the {room} lights at {brightness} percent.
    + switch the {room} light {state}
    + set the light in the {room} to {brightness} percent
transfer_money(to, amount, currency, note)
    send {to} {amount} {currency} for the {note}
    send {amount} {currency} to {to} for the {note}
    transfer {amount} {currency} to {to} for the {note}
    pay {to} {amount} {currency} for the {note}
    I owe {to} {amount} {currency} for the {note}, please pay.
    + give {to} {amount} {currency} for the {note}
    + For the {note}, transfer {amount} {currency} to {to}.
convert_currency(amount, source, target)
    convert {amount} {source} to {target}
    change {amount} {source} into {target}
    How much is {amount} {source} in {target}?
    What are {amount} {source} worth in {target}?
    I have {amount} {source}, how much is that in {target}?
    + calculate what {amount} {source} are in {target}
    + What is {amount} {source} in {target}?
add_event(title, day, time, place)
    add a {title} {day} at {time}
    add the {title} {day} at {time} to my calendar
    put the {title} {day} at {time} in my calendar
    schedule a {title} {day} at {time} at the {place}
    There is a {title} {day} at {time} at the {place}, put it in my calendar.
    The {title} is {day} at {time} at the {place}, add it to my calendar.
    + plan a {title} {day} at {time}
    + enter the {title} {day} at {time} at the {place} in my calendar
"""


@dataclass(frozen=True)
class Function:
    """A callable function has phrasings of a request for it, with its arguments in braces."""

    name: str
    arguments: list[str]
    phrasings: list[str] = field(default_factory=list)
    new_phrasings: list[str] = field(default_factory=list)  # only in held-out rows


def parse_functions(text: str) -> list[Function]:
    """Parse the table of functions and their phrasings."""
    functions: list[Function] = []
    for line in text.strip().splitlines():
        phrasing = line.strip()
        if phrasing.startswith("+ "):
            functions[-1].new_phrasings.append(phrasing.removeprefix("+ "))
        elif line[0].isspace():
            functions[-1].phrasings.append(phrasing)
        else:
            name, _, arguments = line.rstrip(")").partition("(")
            functions.append(Function(name, list(words(arguments))))
    return functions


FUNCTIONS = parse_functions(PHRASINGS)


def pick(rng: Random, values: Sequence[T]) -> T:
    """Choose one of `values` with `random()`, the only method whose results Python guarantees to stay the same."""
    return values[int(rng.random() * len(values))]


def shuffled(rng: Random, values: Iterable[T]) -> list[T]:
    """Return the values in random order, for the same reason with `random()` alone."""
    return sorted(values, key=lambda _: rng.random())


def free_values(argument: str, split: Split) -> list[Value]:
    """Return the values of a free argument that the rows of `split` may use."""
    values = shuffled(Random(f"values of {argument}"), FREE[argument])
    num_held_out = round(len(values) * HELD_OUT_FRACTION)
    return values[:num_held_out] if split == "held_out" else values[num_held_out:]


def draw(function: Function, phrasing: str, split: Split, rng: Random) -> tuple[str, str]:
    """Draw the arguments of a request with the given phrasing, and return the request and its answer."""
    values: dict[str, Value] = {}
    wordings: dict[str, Value] = {}
    for argument in function.arguments:
        if f"{{{argument}}}" not in phrasing:
            continue
        if argument in CLOSED:
            # A currency is not converted into itself.
            unused = [item for item in CLOSED[argument].items() if item[0] not in values.values()]
            value, value_wordings = pick(rng, unused)
            values[argument], wordings[argument] = value, pick(rng, value_wordings)
        else:
            values[argument] = wordings[argument] = pick(rng, free_values(argument, split))
    request = phrasing.format_map(wordings)
    if phrasing[0].islower():
        request = pick(rng, OPENINGS).format(request)
    return request, json.dumps({"function": function.name, "arguments": values})


def rows(split: Split, num_rows: int) -> list[Row]:
    """Generate `num_rows` different rows in random order, with the same number of rows for each function."""
    rng = Random(f"rows of {split}")
    answers: dict[str, str] = {}
    while len(answers) < num_rows:
        turn, index = divmod(len(answers), len(FUNCTIONS))
        function = FUNCTIONS[index]
        is_new = split == "held_out" and turn % NEW_PHRASING_EVERY == NEW_PHRASING_EVERY - 1
        phrasing = pick(rng, function.new_phrasings if is_new else function.phrasings)
        request, answer = draw(function, phrasing, split, rng)
        answers[request] = answer
    return [
        {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}
        for request, answer in shuffled(rng, answers.items())
    ]


def file_text(split: Split) -> str:
    """Return the content of the file of a split."""
    return "".join(json.dumps(row) + "\n" for row in rows(split, NUM_ROWS[split]))


def main(directory: Path) -> None:
    """Write the file of every split into `directory`."""
    for split in NUM_ROWS:
        (directory / f"{split}.jsonl").write_text(file_text(split), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
