"""Tool calls: several tools in varied spellings, requests that fit one, two or none of them.

Names of tools and of their parameters vary from document to document, so that the schema in the
prompt has to be read. A request's arguments stand in the request itself.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from demo.chat import Chat
from demo.generators.lexicon import ANIMALS, CITIES, NAMES, THINGS

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Param:
    """One parameter: its possible names, JSON type and description."""

    names: tuple[str, ...]
    type: str
    description: str
    enum: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A request for a tool: the question, the values of its parameters, an output and a reply."""

    question: str
    values: tuple[Any, ...]
    output: dict[str, Any]
    reply: str


@dataclass(frozen=True)
class Tool:
    """A tool in all its spellings and the maker of its requests."""

    key: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    params: tuple[Param, ...]
    request: Callable[[Random], Request]


def _weather(rng: Random) -> Request:
    city = rng.choice(CITIES)
    degrees, sky = (
        rng.randint(-10, 38),
        rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "clear", "snowy", "stormy")),
    )
    question = rng.choice(
        (
            f"What is the weather in {city}?",
            f"What's the weather like in {city}?",
            f"How is the weather in {city} today?",
            f"Is it raining in {city}?",
            f"Do I need an umbrella in {city}?",
            f"How warm is it in {city} right now?",
            f"Tell me the weather in {city}.",
            f"weather in {city}",
            f"What's the temperature in {city}?",
            f"I am going to {city}. What is the weather there?",
        )
    )
    output = {"temperature": degrees, "condition": sky}
    reply = rng.choice(
        (
            f"In {city} it is {sky} with {degrees} degrees.",
            f"It is {sky} in {city}, with a temperature of {degrees} degrees.",
        )
    )
    return Request(question, (city,), output, reply)


def _time(rng: Random) -> Request:
    city = rng.choice(CITIES)
    clock = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    question = rng.choice(
        (
            f"What time is it in {city}?",
            f"What's the time in {city}?",
            f"How late is it in {city} now?",
            f"Tell me the current time in {city}.",
            f"time in {city}?",
            f"Can you tell me what time it is in {city}?",
        )
    )
    return Request(question, (city,), {"time": clock}, f"It is {clock} in {city}.")


def _calculate(rng: Random) -> Request:
    a, b = rng.randint(2, 9999), rng.randint(2, 999)
    sign, word = rng.choice((("*", "times"), ("+", "plus"), ("-", "minus"), ("*", "multiplied by")))
    value = a * b if sign == "*" else a + b if sign == "+" else a - b
    expression = f"{a} {sign} {b}"
    question = rng.choice(
        (
            f"What is {expression}?",
            f"What is {a} {word} {b}?",
            f"Calculate {expression}.",
            f"Please compute {a} {word} {b}.",
            f"How much is {a} {word} {b}?",
            f"Use the tool to work out {expression}.",
        )
    )
    return Request(question, (expression,), {"result": value}, f"{expression} = {value}")


UNITS = (
    ("miles", "kilometers", 1.609),
    ("kilometers", "miles", 0.621),
    ("pounds", "kilograms", 0.454),
    ("kilograms", "pounds", 2.205),
    ("inches", "centimeters", 2.54),
    ("feet", "meters", 0.305),
    ("meters", "feet", 3.281),
    ("liters", "gallons", 0.264),
    ("gallons", "liters", 3.785),
    ("ounces", "grams", 28.35),
    ("grams", "ounces", 0.035),
    ("yards", "meters", 0.914),
)


def _convert(rng: Random) -> Request:
    source, target, factor = rng.choice(UNITS)
    value = rng.randint(2, 500)
    result = round(value * factor, 1)
    question = rng.choice(
        (
            f"Convert {value} {source} to {target}.",
            f"How many {target} are {value} {source}?",
            f"What is {value} {source} in {target}?",
            f"Please convert {value} {source} into {target}.",
            f"{value} {source} in {target}?",
        )
    )
    return Request(
        question,
        (value, source, target),
        {"result": result},
        f"{value} {source} are {result} {target}.",
    )


TOPICS = (
    "the history of chess",
    "how to grow tomatoes",
    "the best pizza recipe",
    "electric cars",
    "the news about space travel",
    "cheap flights to Rome",
    "how volcanoes form",
    "jazz music",
    "the latest football results",
    "solar panels",
    "learning to play the piano",
    "old castles",
    "how to knit a scarf",
    "deep sea fish",
    "the moon landing",
    "wooden toys",
    "city parks",
    "how to repair a bike",
    "open source licenses",
    "medieval painting",
    "good books for children",
    "green tea",
    "the price of gold",
    "winter boots",
    "hiking trails in Norway",
    "coffee shops in Oslo",
    "how to train a puppy",
    "language courses",
    "the tallest buildings",
    "train travel in Japan",
)


def _topic(rng: Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(TOPICS)
    return rng.choice(
        (
            f"museums in {rng.choice(CITIES)}",
            f"hotels in {rng.choice(CITIES)}",
            f"restaurants in {rng.choice(CITIES)}",
            f"the history of {rng.choice(CITIES)}",
            f"facts about the {rng.choice(ANIMALS)}",
            f"how to draw a {rng.choice(ANIMALS)}",
            f"where to buy {rng.choice(THINGS)}",
        )
    )


def _search(rng: Random) -> Request:
    topic = _topic(rng)
    question = rng.choice(
        (
            f"Search for {topic}.",
            f"Search the web for {topic}.",
            f"Find information about {topic}.",
            f"Look up {topic}.",
            f"Can you search for {topic}?",
            f"Please look up {topic} online.",
            f"Find something on {topic}.",
        )
    )
    title = topic[0].upper() + topic[1:]
    site = rng.choice(("wiki.example", "news.example", "guide.example", "library.example"))
    output = {"title": title, "source": site}
    return Request(question, (topic,), output, f'I found "{title}" at {site}.')


def _timer(rng: Random) -> Request:
    minutes = rng.randint(1, 90)
    question = rng.choice(
        (
            f"Set a timer for {minutes} minutes.",
            f"Start a timer of {minutes} minutes.",
            f"Please set a {minutes} minute timer.",
            f"Remind me in {minutes} minutes.",
            f"timer {minutes} minutes",
            f"Can you start a {minutes} minute timer?",
        )
    )
    return Request(
        question, (minutes,), {"status": "started"}, f"The timer is set for {minutes} minutes."
    )


PHRASES = (
    "good morning",
    "thank you",
    "where is the station",
    "I am hungry",
    "see you tomorrow",
    "how much is it",
    "my name is Tom",
    "I love you",
    "good night",
    "the book is on the table",
    "I would like a coffee",
    "it is raining",
    "happy birthday",
    "please help me",
    "what time is it",
    "the cat is black",
    "we are friends",
    "I don't understand",
    "have a nice day",
    "open the door",
)
TONGUES = [
    "French",
    "German",
    "Spanish",
    "Italian",
    "Portuguese",
    "Dutch",
    "Swedish",
    "Polish",
    "Greek",
    "Turkish",
    "Japanese",
    "Finnish",
]


def _translate(rng: Random) -> Request:
    phrase, tongue = rng.choice(PHRASES), rng.choice(TONGUES)
    question = rng.choice(
        (
            f'Translate "{phrase}" to {tongue}.',
            f'Translate "{phrase}" into {tongue}.',
            f'How do you say "{phrase}" in {tongue}?',
            f'What is "{phrase}" in {tongue}?',
            f'Please translate this to {tongue}: "{phrase}"',
        )
    )
    return Request(
        question, (phrase, tongue), {"status": "done"}, f'The translation of "{phrase}" is ready.'
    )


MESSAGES = (
    "I will be late",
    "dinner is ready",
    "call me back",
    "the meeting is at ten",
    "I am on my way",
    "happy birthday",
    "see you at the station",
    "bring some milk",
    "the keys are on the table",
    "good luck",
    "I miss you",
    "we won the game",
    "the train is late",
    "thanks for your help",
)


def _message(rng: Random) -> Request:
    name, text = rng.choice(NAMES), rng.choice(MESSAGES)
    question = rng.choice(
        (
            f'Send a message to {name}: "{text}"',
            f'Send {name} the message "{text}".',
            f'Text {name} "{text}".',
            f'Write to {name}: "{text}"',
            f'Please send "{text}" to {name}.',
        )
    )
    return Request(question, (name, text), {"status": "sent"}, f"I sent the message to {name}.")


SONGS = (
    "Yellow Moon",
    "River Song",
    "Dancing Leaves",
    "Winter Waltz",
    "Blue Train",
    "Morning Light",
    "Old Friends",
    "Summer Rain",
    "Little Star",
    "Golden Road",
    "Paper Planes",
    "City Lights",
)


def _music(rng: Random) -> Request:
    song = rng.choice(SONGS)
    question = rng.choice(
        (
            f'Play "{song}".',
            f'Play the song "{song}".',
            f'I want to hear "{song}".',
            f'Please play "{song}".',
            f'Put on "{song}".',
        )
    )
    return Request(question, (song,), {"status": "playing"}, f'Now playing "{song}".')


def _shopping(rng: Random) -> Request:
    item = rng.choice(
        [
            "milk",
            "bread",
            "butter",
            "eggs",
            "cheese",
            "rice",
            "pasta",
            "sugar",
            "salt",
            "tea",
            "coffee",
            "honey",
            "soap",
            "flour",
            "apples",
            "bananas",
            "tomatoes",
            "potatoes",
            "onions",
            "carrots",
            "yogurt",
            "juice",
        ]
    )
    amount = rng.randint(1, 12)
    question = rng.choice(
        (
            f"Put {amount} {item} on my shopping list.",
            f"Add {amount} {item} to the shopping list.",
            f"I need {amount} {item}. Put it on the list.",
            f"Please add {amount} {item} to my list.",
        )
    )
    return Request(
        question,
        (item, amount),
        {"status": "added"},
        f"I added {amount} {item} to your shopping list.",
    )


def _event(rng: Random) -> Request:
    day = rng.choice(["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"])
    hour = f"{rng.randrange(7, 22):02d}:{rng.choice((0, 15, 30, 45)):02d}"
    what = rng.choice(
        (
            "a meeting",
            "lunch",
            "the dentist",
            "a concert",
            "yoga",
            "a phone call",
            "football training",
            "a haircut",
            "dinner",
            "a piano lesson",
            "swimming",
            "the parents' evening",
        )
    )
    title = what.removeprefix("a ").removeprefix("the ")
    question = rng.choice(
        (
            f"Put {what} on {day} at {hour} in my calendar.",
            f"Add {what} to my calendar for {day} at {hour}.",
            f"Schedule {what} on {day} at {hour}.",
            f"I have {what} on {day} at {hour}, please add it to the calendar.",
        )
    )
    return Request(
        question, (title, day, hour), {"status": "created"}, f"I added {title} on {day} at {hour}."
    )


def _stock(rng: Random) -> Request:
    name = rng.choice(
        [
            "Acme",
            "Globex",
            "Initech",
            "Umbrella",
            "Stark",
            "Wayne",
            "Hooli",
            "Vandelay",
            "Soylent",
            "Cyberdyne",
            "Tyrell",
            "Wonka",
        ]
    )
    price = round(rng.uniform(3, 900), 2)
    question = rng.choice(
        (
            f"What is the stock price of {name}?",
            f"How much is a share of {name}?",
            f"What's {name} trading at?",
            f"Give me the current stock price of {name}.",
        )
    )
    return Request(question, (name,), {"price": price}, f"A share of {name} costs {price} dollars.")


def _dice(rng: Random) -> Request:
    sides = rng.choice((4, 6, 8, 10, 12, 20))
    value = rng.randint(1, sides)
    question = rng.choice(
        (
            f"Roll a die with {sides} sides.",
            f"Roll a {sides}-sided die.",
            f"Please roll a d{sides}.",
            f"Throw a die with {sides} sides for me.",
        )
    )
    return Request(question, (sides,), {"value": value}, f"You rolled a {value}.")


CITY = Param(("city", "location", "place"), "string", "Name of the city")
TOOLS: tuple[Tool, ...] = (
    Tool(
        "weather",
        ("get_weather", "weather", "current_weather", "get_current_weather", "weather_lookup"),
        (
            "Get the current weather of a city",
            "Current weather and temperature",
            "Look up the weather",
        ),
        (CITY,),
        _weather,
    ),
    Tool(
        "time",
        ("get_time", "current_time", "world_clock", "get_current_time"),
        ("Get the current time in a city", "Tell the time of a place", "World clock"),
        (CITY,),
        _time,
    ),
    Tool(
        "calculator",
        ("calculator", "calculate", "compute", "evaluate"),
        ("Evaluate an arithmetic expression", "A calculator", "Compute the value of an expression"),
        (Param(("expression", "formula", "input"), "string", "The expression, such as 2 * 3"),),
        _calculate,
    ),
    Tool(
        "convert",
        ("convert_units", "unit_converter", "convert"),
        ("Convert a value from one unit to another", "Unit conversion"),
        (
            Param(("value", "amount"), "number", "The value"),
            Param(("from_unit", "source", "from"), "string", "Unit to convert from"),
            Param(("to_unit", "target", "to"), "string", "Unit to convert to"),
        ),
        _convert,
    ),
    Tool(
        "search",
        ("web_search", "search", "search_web", "find_online"),
        ("Search the web", "Find pages on the internet", "Web search"),
        (Param(("query", "q", "keywords"), "string", "What to search for"),),
        _search,
    ),
    Tool(
        "timer",
        ("set_timer", "timer", "start_timer"),
        ("Start a timer", "Set a timer for some minutes"),
        (Param(("minutes", "duration"), "integer", "Minutes until it rings"),),
        _timer,
    ),
    Tool(
        "translate",
        ("translate", "translate_text", "translator"),
        ("Translate a text", "Translate text to another language"),
        (
            Param(("text", "phrase"), "string", "The text"),
            Param(("language", "target_language"), "string", "Language to translate to"),
        ),
        _translate,
    ),
    Tool(
        "message",
        ("send_message", "send_text", "message"),
        ("Send a message to a person", "Send a text message"),
        (
            Param(("recipient", "to", "name"), "string", "Who gets the message"),
            Param(("text", "message", "body"), "string", "The text of the message"),
        ),
        _message,
    ),
    Tool(
        "music",
        ("play_music", "play_song", "music_player"),
        ("Play a song", "Play music"),
        (Param(("song", "title"), "string", "Title of the song"),),
        _music,
    ),
    Tool(
        "shopping",
        ("add_to_list", "shopping_list", "add_item"),
        ("Add something to the shopping list", "Shopping list"),
        (
            Param(("item", "product"), "string", "What to buy"),
            Param(("quantity", "count"), "integer", "How many"),
        ),
        _shopping,
    ),
    Tool(
        "event",
        ("create_event", "add_event", "calendar"),
        ("Add an event to the calendar", "Create a calendar entry"),
        (
            Param(("title", "event"), "string", "Title of the event"),
            Param(("day", "weekday"), "string", "Day of the week"),
            Param(("time", "start"), "string", "Time as HH:MM"),
        ),
        _event,
    ),
    Tool(
        "stock",
        ("get_stock_price", "stock_price", "stock_quote"),
        ("Get the price of a share", "Current stock price of a company"),
        (Param(("company", "symbol"), "string", "Name of the company"),),
        _stock,
    ),
    Tool(
        "dice",
        ("roll_dice", "roll_die", "dice"),
        ("Roll a die", "Throw a die with some sides"),
        (Param(("sides", "faces"), "integer", "Number of sides"),),
        _dice,
    ),
)
BY_KEY = {tool.key: tool for tool in TOOLS}


@dataclass(frozen=True)
class Spelled:
    """A tool in one spelling: its JSON schema and the names of its parameters."""

    schema: dict[str, Any]
    name: str
    parameters: tuple[str, ...]


def spell(rng: Random, tool: Tool) -> Spelled:
    """Choose names and descriptions."""
    names = tuple(rng.choice(p.names) for p in tool.params)
    plain = rng.random() < 0.25
    properties: dict[str, Any] = {}
    for name, p in zip(names, tool.params, strict=True):
        properties[name] = (
            {"type": p.type}
            if plain
            else {
                "type": p.type,
                "description": p.description,
            }
        )
    name = rng.choice(tool.names)
    schema = {
        "type": "function",
        "function": {
            "name": name,
            "description": rng.choice(tool.descriptions),
            "parameters": {"type": "object", "properties": properties, "required": list(names)},
        },
    }
    return Spelled(schema, name, names)


def offer(rng: Random, keys: list[str]) -> dict[str, Spelled]:
    """The tools of those keys, each in one spelling, no name twice."""
    while True:
        spelled = {key: spell(rng, BY_KEY[key]) for key in keys}
        if len({s.name for s in spelled.values()}) == len(keys):
            return spelled


def call_turn(calls: list[tuple[str, Arguments]], content: str = "") -> dict[str, Any]:
    """An assistant turn that calls tools."""
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ],
    }


def _arguments(spelled: Spelled, request: Request) -> Arguments:
    return dict(zip(spelled.parameters, request.values, strict=True))


REFUSALS = {
    "weather": "I have no tool for the weather, so I cannot tell you that.",
    "time": "I have no clock here, so I cannot tell you the time.",
    "search": "I cannot search the web here.",
    "timer": "I cannot set a timer here.",
    "message": "I cannot send messages here.",
    "music": "I cannot play music here.",
    "shopping": "I have no shopping list here.",
    "event": "I have no calendar here.",
    "stock": "I do not know current stock prices.",
    "dice": "I cannot roll dice here.",
    "translate": "I have no tool for translations, sorry.",
    "convert": "I have no tool for units here, sorry.",
}
PLEAS = ("", "", "", "", "Hello! ", "Hi, ", "Hey, ", "Please help me. ")


def _soften(rng: Random, question: str) -> str:
    lead = rng.choice(PLEAS)
    if lead.endswith(", ") and not question.startswith("I "):
        question = question[0].lower() + question[1:]
    return lead + question


def tool_chat(rng: Random, other: Callable[[Random], Chat]) -> Chat:
    """A conversation with tools offered.

    `other` makes a question that needs no tool. Kinds: a fitting call (most), the call with its
    result used in the reply, two calls at once, a question that needs no tool, a request that no
    offered tool fits.
    """
    kind = rng.choices(("call", "result", "two", "plain", "none"), (38, 30, 6, 14, 12))[0]
    keys = [t.key for t in TOOLS]
    count = rng.choices((1, 2, 3, 4), (3, 4, 3, 1))[0]
    system = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.3 else []
    if kind == "plain":
        # arithmetic would fit a calculator, and times a clock: leave such tools out
        offered = offer(
            rng, rng.sample([k for k in keys if k not in ("calculator", "search")], count)
        )
        chat = other(rng)
        chat.messages = system + chat.messages
        chat.tools = [s.schema for s in offered.values()]
        chat.kind = "tools"
        chat.expected = {"calls": [], "answer": chat.messages[-1]["content"], "exact": False}
        return chat
    if kind == "none":
        wanted = rng.choice(list(REFUSALS))
        similar = {
            "time": {"timer", "search", "event"},
            "timer": {"event"},
            "event": {"timer"},
            "message": {"translate"},
            "translate": {"message", "search"},
        }
        avoid = {wanted, "search"} | similar.get(wanted, set())
        offered = offer(rng, rng.sample([k for k in keys if k not in avoid], count))
        request = BY_KEY[wanted].request(rng)
        messages = [
            *system,
            {"role": "user", "content": _soften(rng, request.question)},
            {"role": "assistant", "content": REFUSALS[wanted]},
        ]
        chat = Chat(messages, [s.schema for s in offered.values()], kind="tools")
        chat.expected = {"calls": [], "answer": REFUSALS[wanted], "exact": True}
        return chat
    if kind == "two":
        count = max(count, 2)
    offered = offer(rng, rng.sample(keys, count))
    chosen = list(offered.items())[: 2 if kind == "two" else 1]
    schemas = [s.schema for s in offered.values()]
    rng.shuffle(schemas)
    requests = [BY_KEY[key].request(rng) for key, _ in chosen]
    if kind == "two" and rng.random() < 0.4:
        # the same tool twice
        chosen = [chosen[0], chosen[0]]
        requests[1] = BY_KEY[chosen[0][0]].request(rng)
    calls = [
        (spelled.name, _arguments(spelled, request))
        for (_, spelled), request in zip(chosen, requests, strict=True)
    ]
    question = _soften(rng, requests[0].question)
    if kind == "two":
        question += rng.choice((" And: ", " Also: ", " Then: ")) + requests[1].question
    expected = {"calls": [[name, arguments] for name, arguments in calls]}
    messages = [*system, {"role": "user", "content": question}, call_turn(calls)]
    if kind != "call":
        messages += [
            {"role": "tool", "content": json.dumps(r.output, ensure_ascii=False)} for r in requests
        ]
        reply = " ".join(r.reply for r in requests)
        messages.append({"role": "assistant", "content": reply})
        expected["reply"] = reply
    chat = Chat(messages, schemas, kind="tools")
    chat.expected = expected
    if kind == "call" and rng.random() < 0.25:
        name = calls[0][0]
        chat.thoughts = (
            f"The tool {name} fits. "
            + "; ".join(f"{k} is {v}" for k, v in calls[0][1].items())
            + "."
        )
    return chat


SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in short sentences.",
    "You are latentcore, a small demo assistant.",
    "Answer briefly.",
    "You are a helpful assistant with access to tools.",
    "Be polite and short.",
)
