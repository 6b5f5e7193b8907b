# ruff: noqa: ISC004  questions of several sentences
"""Arithmetic and sorting problems, with and without a `<think>` trace that leads to the answer."""

from random import Random

from demo.chat import Chat
from demo.generators.lexicon import NAMES, SORT_WORDS, THINGS

ADD_FORMS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "{a} + {b} = ?",
    "{a} + {b}",
    "{a}+{b}",
    "{a}+{b}=?",
    "Add {a} and {b}.",
    "Add {a} to {b}.",
    "Please add {a} and {b}.",
    "Calculate {a} + {b}.",
    "Compute {a} + {b}.",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Can you add {a} and {b}?",
    "Can you tell me what {a} + {b} is?",
    "What's {a} + {b}?",
    "what is {a}+{b}",
    "Sum {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "Find the sum of {a} and {b}.",
    "Tell me {a} plus {b}.",
    "Solve {a} + {b}.",
)
SUBTRACT_FORMS = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "{a} - {b} = ?",
    "{a} - {b}",
    "Subtract {b} from {a}.",
    "Calculate {a} - {b}.",
    "How much is {a} - {b}?",
    "How much is {a} minus {b}?",
    "Take {b} away from {a}.",
    "What's {a} - {b}?",
    "What is the difference between {a} and {b}?",
)
MULTIPLY_FORMS = (
    "What is {a} x {b}?",
    "What is {a} times {b}?",
    "What is {a} * {b}?",
    "{a} * {b} = ?",
    "{a} x {b}",
    "Multiply {a} by {b}.",
    "How much is {a} times {b}?",
    "Calculate {a} * {b}.",
)
PLACES = ("Ones", "Tens", "Hundreds", "Thousands")


def _digits(n: int) -> list[int]:
    """Digits, lowest first."""
    return [int(c) for c in reversed(str(n))]


def add_trace(a: int, b: int) -> str:
    """Column-by-column addition."""
    da, db = _digits(a), _digits(b)
    lines, carry, result = [f"Add {a} and {b} column by column."], 0, ""
    for i in range(max(len(da), len(db))):
        x, y = (da[i] if i < len(da) else 0), (db[i] if i < len(db) else 0)
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        carry, digit = divmod(total, 10)
        result = str(digit) + result
        tail = f", write {digit}, carry {carry}" if carry else f", write {digit}"
        lines.append(f"{PLACES[i]}: {x} + {y}{carried} = {total}{tail}. So far: {result}")
    if carry:
        result = str(carry) + result
        lines.append(f"Carry left: write {carry}. So far: {result}")
    lines.append(f"The result is {result}.")
    return "\n".join(lines)


def subtract_trace(a: int, b: int) -> str:
    """Column-by-column subtraction, a >= b."""
    da, db = _digits(a), _digits(b)
    lines, borrow, result = [f"Subtract {b} from {a} column by column."], 0, ""
    for i in range(len(da)):
        x, y = da[i], (db[i] if i < len(db) else 0)
        taken = f" - {borrow}" if borrow else ""
        value = x - y - borrow
        if value < 0:
            lines_tail = (
                f"{x} - {y}{taken} is below 0, borrow: {x + 10} - {y}{taken} = {value + 10}"
            )
            value, borrow = value + 10, 1
        else:
            lines_tail = f"{x} - {y}{taken} = {value}"
            borrow = 0
        result = str(value) + result
        lines.append(f"{PLACES[i]}: {lines_tail}. So far: {result}")
    lines.append(f"The result is {int(result)}.")
    return "\n".join(lines)


def multiply_trace(a: int, b: int) -> str:
    """a up to two digits times a one-digit b, by parts."""
    tens, ones = divmod(a, 10)
    if not tens:
        return f"{a} times {b} is in the table: {a * b}."
    return (
        f"Split {a} into {tens * 10} and {ones}.\n"
        f"{tens * 10} x {b} = {tens * 10 * b}\n{ones} x {b} = {ones * b}\n"
        f"{tens * 10 * b} + {ones * b} = {a * b}"
    )


def operand(rng: Random) -> int:
    """A number of up to three digits, three digits most often."""
    return rng.randrange(10 ** rng.choices((1, 2, 3), (1, 3, 8))[0])


def addition_pair(rng: Random) -> tuple[int, int]:
    """Two operands of up to three digits."""
    return operand(rng), operand(rng)


def addition(rng: Random, pair: tuple[int, int], thinking: bool) -> Chat:
    """An addition in one of many wordings."""
    a, b = pair
    question = rng.choice(ADD_FORMS).format(a=a, b=b)
    if rng.random() < 0.08:
        question = question.lower()
    chat = Chat.ask(question, f"{a} + {b} = {a + b}", kind="addition")
    chat.thoughts = add_trace(a, b) if thinking else None
    chat.expected = {"answer": str(a + b), "operands": [a, b]}
    return chat


def other_arithmetic(rng: Random, thinking: bool) -> Chat:
    """Subtraction, small products, word problems, comparisons."""
    form = rng.choice(("subtract", "subtract", "multiply", "story", "story", "compare"))
    if form == "subtract":
        a, b = sorted((operand(rng), operand(rng)), reverse=True)
        question = rng.choice(SUBTRACT_FORMS).format(a=a, b=b)
        answer, thoughts = f"{a} - {b} = {a - b}", subtract_trace(a, b)
    elif form == "multiply":
        a, b = rng.randint(2, 99), rng.randint(2, 9)
        question = rng.choice(MULTIPLY_FORMS).format(a=a, b=b)
        answer, thoughts = f"{a} x {b} = {a * b}", multiply_trace(a, b)
    elif form == "compare":
        a, b = operand(rng), operand(rng)
        if a == b:
            b += 1
        question = rng.choice(
            (
                f"Which is larger, {a} or {b}?",
                f"Which number is bigger: {a} or {b}?",
                f"Is {a} greater than {b}?",
            )
        )
        yes = "Yes, " if a > b else "No, "
        answer = (yes if question.startswith("Is") else "") + f"{max(a, b)} is larger"
        answer += f" than {min(a, b)}."
        thoughts = f"Compare {a} and {b}. {max(a, b)} is more than {min(a, b)}."
    else:
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        a, b = rng.randint(3, 99), rng.randint(2, 60)
        if rng.random() < 0.5:
            question = rng.choice(
                (
                    f"{name} has {a} {thing} and gets {b} more. "
                    f"How many {thing} does {name} have now?",
                    f"{name} finds {a} {thing} in the morning and {b} in the evening. "
                    f"How many {thing} is that in all?",
                    f"There are {a} {thing} in one box and {b} in another. "
                    f"How many {thing} are there together?",
                )
            )
            lead = f"{name} has" if f"does {name}" in question else "There are"
            if "finds" in question:
                lead = "That is"
            answer, thoughts = f"{lead} {a + b} {thing}.", add_trace(a, b)
        else:
            a, b = max(a, b), min(a, b)
            question = rng.choice(
                (
                    f"{name} has {a} {thing} and gives away {b}. "
                    f"How many {thing} does {name} have left?",
                    f"{name} had {a} {thing} but lost {b}. How many {thing} does {name} have left?",
                )
            )
            answer, thoughts = f"{name} has {a - b} {thing} left.", subtract_trace(a, b)
    chat = Chat.ask(question, answer, kind="arithmetic")
    chat.thoughts = thoughts if thinking else None
    return chat


UP_FORMS = (
    "Sort these numbers: {l}.",
    "Sort these numbers in ascending order: {l}.",
    "Sort {l} from smallest to largest.",
    "Sort the list {l}.",
    "Put these numbers in order: {l}",
    "Please sort: {l}",
    "Order these numbers from small to large: {l}",
    "Arrange {l} in increasing order.",
    "Can you sort these numbers? {l}",
    "Sort this list: {l}",
    "Sort: {l}",
)
DOWN_FORMS = (
    "Sort these numbers in descending order: {l}.",
    "Sort {l} from largest to smallest.",
    "Order these numbers from large to small: {l}",
    "Arrange {l} in decreasing order.",
    "Sort this list, largest first: {l}",
)
WORD_FORMS = (
    "Sort these words alphabetically: {l}.",
    "Put these words in alphabetical order: {l}",
    "Sort the words {l}.",
    "Arrange these words from A to Z: {l}",
)


def sort_trace(items: list[str], ordered: list[str], pick: str) -> str:
    """Selection sort, written out: at each step the chosen item and what is left."""
    left, lines = list(items), []
    for item in ordered[:-1]:
        left.remove(item)
        lines.append(f"{pick} is {item}. Left: {', '.join(left)}")
    lines.append(f"Last is {ordered[-1]}.")
    return "\n".join(lines)


def sorting_items(rng: Random) -> tuple[list[str], list[str], str, str]:
    """Items, the same in order, the question's form and the word for the picked item."""
    kind = rng.choices(("up", "down", "words"), (6, 2, 2))[0]
    size = rng.choices((3, 4, 5, 6, 7), (3, 4, 5, 3, 1))[0]
    if kind == "words":
        items = rng.sample(SORT_WORDS, min(size, 5))
        return items, sorted(items), rng.choice(WORD_FORMS), "First"
    top = rng.choices((10, 100, 1000), (2, 6, 2))[0]
    numbers = rng.sample(range(top), size)
    ordered = sorted(numbers, reverse=kind == "down")
    form = rng.choice(UP_FORMS if kind == "up" else DOWN_FORMS)
    pick = "Smallest" if kind == "up" else "Largest"
    return [str(n) for n in numbers], [str(n) for n in ordered], form, pick


def sorting(rng: Random, thinking: bool) -> Chat:
    """A short list to sort."""
    items, ordered, form, pick = sorting_items(rng)
    text = ", ".join(items)
    if "list" in form and rng.random() < 0.5:
        text = f"[{text}]"
    elif "words {l}" not in form and rng.random() < 0.15:
        text = " ".join(items)
    chat = Chat.ask(form.format(l=text), ", ".join(ordered), kind="sorting")
    chat.thoughts = sort_trace(items, ordered, pick) if thinking else None
    chat.expected = {"answer": ", ".join(ordered), "items": sorted(items)}
    return chat
