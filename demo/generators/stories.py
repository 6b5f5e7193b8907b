# ruff: noqa: E501  tables of sentences, one a line
"""A seeded story grammar: a hero with a wish, a problem, an attempt, a helper, an ending.

Parts agree with each other: names, pronouns, the place, the lost or wanted thing and the lesson
are drawn once a story and carried through it.
"""

from dataclasses import dataclass
from random import Random

from demo.chat import Chat
from demo.generators.facts import a
from demo.generators.lexicon import ANIMALS, BEINGS, NAMES

PLACES: tuple[tuple[str, str, str], ...] = (
    # where, a feature of it, what grows or stands there
    ("in a quiet forest", "the old oak", "tall trees"),
    ("at the edge of a green meadow", "the big stone", "wild flowers"),
    ("near a blue lake", "the wooden bridge", "long reeds"),
    ("on a small farm", "the red barn", "rows of corn"),
    ("in a little village", "the market square", "white houses"),
    ("on a windy hill", "the stone tower", "yellow grass"),
    ("by the sea", "the lighthouse", "smooth rocks"),
    ("in a deep valley", "the waterfall", "soft moss"),
    ("in a busy town", "the clock tower", "narrow streets"),
    ("on a lonely island", "the tall palm", "warm sand"),
    ("in a snowy land", "the frozen river", "dark pines"),
    ("in a garden behind a school", "the apple tree", "pea plants"),
    ("at the foot of a mountain", "the narrow cave", "thorny bushes"),
    ("in a warm jungle", "the hanging bridge", "huge leaves"),
)
TRAITS: tuple[tuple[str, str], ...] = (
    ("brave", "bravery"),
    ("shy", "quiet heart"),
    ("curious", "curiosity"),
    ("clever", "wit"),
    ("kind", "kindness"),
    ("proud", "pride"),
    ("cheerful", "good mood"),
    ("stubborn", "stubbornness"),
    ("gentle", "gentle way"),
    ("lazy", "long naps"),
    ("careful", "careful steps"),
    ("playful", "games"),
    ("patient", "patience"),
    ("hungry", "appetite"),
    ("small", "small size"),
    ("young", "big dreams"),
    ("old", "long memory"),
    ("lonely", "sad songs"),
)
TREASURES = (
    "silver key",
    "red scarf",
    "golden bell",
    "blue lantern",
    "old map",
    "wooden flute",
    "round mirror",
    "little drum",
    "green kite",
    "warm blanket",
    "shiny coin",
    "paper boat",
    "glass marble",
    "brass compass",
    "picture book",
    "straw hat",
    "music box",
    "copper ring",
)
SPOTS = (
    "under a pile of leaves",
    "behind {feature}",
    "inside a hollow log",
    "next to a muddy puddle",
    "between two roots",
    "on top of {feature}",
    "deep in the grass",
    "in a bird's nest",
    "under a loose stone",
    "at the bottom of a basket",
    "in the shade of {feature}",
)
WEATHER = (
    "The sun was shining and the air smelled of summer.",
    "A soft rain was falling.",
    "The wind was cold that day.",
    "It was a bright and clear morning.",
    "Fog lay over everything.",
    "The first snow had just fallen.",
    "It was the hottest day of the year.",
    "Clouds were gathering in the west.",
    "The stars were still out.",
    "A rainbow stood in the sky.",
)
FOODS = (
    "warm soup",
    "honey cakes",
    "fresh berries",
    "a big apple pie",
    "roasted nuts",
    "sweet bread",
    "pancakes",
    "a bowl of cherries",
    "carrot stew",
    "cheese and plums",
)
MORALS = {
    "help": (
        "It is easier to find a way together than alone.",
        "A friend who helps is worth more than gold.",
        "Asking for help is no shame.",
        "Those who help others are never alone.",
    ),
    "try": (
        "Those who keep trying will get there in the end.",
        "Every big thing starts with a small step.",
        "Practice makes things easy.",
        "Falling down is part of learning.",
    ),
    "share": (
        "What we share tastes twice as good.",
        "There is always enough when everyone gives a little.",
        "A shared joy is a double joy.",
    ),
    "truth": (
        "The truth may be hard to say, but it makes the heart light.",
        "An honest word mends what a lie has broken.",
        "It is better to tell the truth at once.",
    ),
    "fear": (
        "Things look smaller when you walk up to them.",
        "Being brave means going on although you are afraid.",
        "Most fears are only shadows.",
    ),
    "kind": (
        "Kindness comes back in ways that nobody expects.",
        "A small kindness can change a whole day.",
        "Be kind first, and the world will follow.",
    ),
}


@dataclass(frozen=True)
class Hero:
    """A character: name, species and pronouns."""

    name: str
    kind: str
    they: str
    them: str
    their: str

    @property
    def They(self) -> str:  # noqa: N802
        return self.they.capitalize()

    @property
    def Their(self) -> str:  # noqa: N802
        return self.their.capitalize()


FEMALE = {
    *[
        "Anna",
        "Clara",
        "Ella",
        "Grace",
        "Ivy",
        "Kate",
        "Mia",
        "Olive",
        "Rosa",
        "Tina",
        "Lily",
        "Nora",
        "Ruby",
        "Zoe",
        "Emma",
        "Sara",
        "Aisha",
        "Yuki",
        "Maya",
    ],
    *["Priya", "Elena", "Sofia", "Ingrid", "Amara", "Mei", "Nadia", "Greta", "Hannah"],
}


def hero(rng: Random, kind: str, taken: set[str]) -> Hero:
    """A character of that kind with a name of its own."""
    name = rng.choice([n for n in NAMES if n not in taken])
    taken.add(name)
    if kind == "princess":
        name = rng.choice([n for n in NAMES if n in FEMALE])
    if kind == "king":
        name = rng.choice([n for n in NAMES if n not in FEMALE])
    if name in FEMALE:
        return Hero(name, kind, "she", "her", "her")
    return Hero(name, kind, "he", "him", "his")


@dataclass
class World:
    """What is drawn once for a story."""

    rng: Random
    h: Hero
    f: Hero
    where: str
    feature: str
    plants: str
    trait: str
    thing: str
    food: str

    def pick(self, *options: str) -> str:
        """One of the sentences, with the world's words filled in."""
        h, f = self.h, self.f
        return self.rng.choice(options).format(
            h=h.name,
            hk=h.kind,
            ahk=a(h.kind),
            he=h.they,
            He=h.They,
            him=h.them,
            his=h.their,
            His=h.Their,
            f=f.name,
            fk=f.kind,
            afk=a(f.kind),
            she=f.they,
            She=f.They,
            her=f.them,
            hers=f.their,
            where=self.where,
            feature=self.feature,
            Feature=self.feature.capitalize(),
            plants=self.plants,
            thing=self.thing,
            athing=a(self.thing),
            food=self.food,
            trait=self.trait,
            atrait=a(self.trait),
        )


def opening(w: World) -> list[str]:
    """Who and where."""
    first = w.pick(
        "Once upon a time, {atrait} {hk} named {h} lived {where}.",
        "There once was {atrait} {hk} called {h} who lived {where}.",
        "Long ago, {where}, there lived {atrait} {hk} whose name was {h}.",
        "{h} was {atrait} {hk} who lived {where}.",
        "{where_cap}, {atrait} {hk} named {h} had a small home.".replace(
            "{where_cap}", w.where[0].upper() + w.where[1:]
        ),
        "This is the story of {h}, {atrait} {hk} {where}.",
    )
    second = w.pick(
        "Every morning {he} walked to {feature} and looked at the {plants}.",
        "{His} home stood close to {feature}, among the {plants}.",
        "All around there were {plants}, and {feature} could be seen from far away.",
        "Most of all {he} liked to sit by {feature} and eat {food}.",
        "{He} knew every path between {feature} and the {plants}.",
        "{He} loved the {plants} and the sound of the wind.",
    )
    return [first, second] if w.rng.random() < 0.85 else [first]


def meeting(w: World) -> str:
    """The friend appears."""
    return w.pick(
        "Then {he} met {afk} named {f}.",
        "On the way {he} met {f}, {afk} from far away.",
        "Just then {afk} called {f} came along.",
        "Near {feature} sat {afk} named {f}.",
        "Not long after, {f} the {fk} came by.",
        "Behind {feature} {he} heard a voice. It was {f} the {fk}.",
    )


def lost(w: World) -> tuple[list[str], str]:
    spot = w.pick(*SPOTS)
    wrong = w.pick(*[s for s in SPOTS if "{feature}" not in s])
    if wrong == spot:
        wrong = "in the kitchen"
    return [
        w.pick(
            "{h} had {athing} that {he} loved more than anything else.",
            "{His} greatest treasure was {athing}.",
            "{He} always carried {athing} with {him}.",
        ),
        w.pick(
            "One day the {thing} was gone.",
            "But one morning {he} could not find the {thing} anywhere.",
            "One evening {he} saw that the {thing} was missing.",
        ),
        w.pick(
            "{h} looked " + wrong + ", but it was not there.",
            "First {he} searched " + wrong + ", but found nothing.",
            "{He} looked everywhere, even " + wrong + ".",
        ),
        w.pick(
            "{He} sat down and began to cry.",
            "{He} felt very sad.",
            "{He} did not know what to do.",
        ),
        meeting(w),
        w.pick(
            '"Why are you so sad?" asked {f}. "I have lost my {thing}," said {h}.',
            '"What is wrong?" {she} asked. "My {thing} is gone," {h} answered.',
            '"Can you help me find my {thing}?" asked {h}. "Of course," said {f}.',
        ),
        w.pick(
            '"Let us look together," said {f}.',
            '"Four eyes see more than two," {f} said with a smile.',
            '"Where did you have it last?" asked {f}. {h} thought for a while.',
        ),
        w.pick(
            "They searched until the sun went down, and there it was, " + spot + ".",
            "They walked step by step along the path, and at last they found it " + spot + ".",
            "After a long time {f} gave a shout. The {thing} lay " + spot + "!",
        ),
        w.pick(
            "{h} was so happy that {he} hugged {f}.",
            '"Thank you, {f}!" cried {h}.',
            "{h} laughed and danced for joy.",
        ),
        w.pick(
            "That night they ate {food} together.",
            "From that day on, {h} and {f} were best friends.",
            "{h} gave {f} a big bowl of {food} as thanks.",
            "They went home side by side and talked until late.",
        ),
    ], "help"


def learn(w: World) -> tuple[list[str], str]:
    skill, tool, hard = w.rng.choice(
        (
            ("swim", "in the water", "the water was cold and deep"),
            ("dance", "on the grass", "{his} feet went the wrong way"),
            ("sing", "in front of others", "{his} voice was too quiet"),
            ("climb", "on {feature}", "{he} slipped again and again"),
            ("paint", "on a big sheet of paper", "the colors ran together"),
            ("bake bread", "in the kitchen", "the bread came out black"),
            ("skate", "on the ice", "{he} fell on {his} nose"),
            ("juggle", "with three nuts", "the nuts rolled away"),
            ("play the flute", "by {feature}", "it only squeaked"),
            ("row a boat", "on the water", "the boat turned in circles"),
            ("tell jokes", "at dinner", "nobody laughed"),
            ("read", "from a thick book", "the letters looked like ants"),
        )
    )
    return [
        w.pick(
            f"More than anything, {{h}} wanted to learn to {skill}.",
            f"{{h}} had one big wish: {{he}} wanted to {skill}.",
            f'One day {{h}} said, "I want to learn to {skill}."',
        ),
        w.pick(
            f"{{He}} tried it {tool}, but {hard}.",
            f"On the first day {{he}} tried {tool}, but {hard}.",
        ),
        w.pick(
            "The others laughed at {him}.",
            '"I will never learn it," {he} thought.',
            "{He} went home and was sad.",
            "{He} was tired and wanted to give up.",
        ),
        meeting(w),
        w.pick(
            f'"I was bad at it too," said {{f}}. "To {skill} you need time."',
            f'"Do you want to {skill}?" asked {{f}}. "I can show you how."',
            '"Nobody can do it on the first day," said {f}. "Try once more."',
        ),
        w.pick(
            f"Every day they practiced {tool}.",
            "They met every morning and practiced for an hour.",
            "{f} showed {him} each step slowly, and {h} tried it again.",
        ),
        w.pick(
            "After one week it went a little better.",
            "Bit by bit it became easier.",
            "On the third day {h} made only one mistake.",
        ),
        w.pick(
            f"At the end of the summer, {{h}} could {skill} better than anyone {{where}}.",
            f"And one morning it worked. {{h}} could {skill}!",
            f"When the big feast came, everyone saw how well {{h}} could {skill}.",
        ),
        w.pick(
            "Everyone clapped, and {f} clapped the loudest.",
            '"I knew you could do it," said {f}.',
            "{h} was very proud and thanked {f}.",
        ),
    ], "try"


def share(w: World) -> tuple[list[str], str]:
    return [
        w.pick(
            "One autumn {h} gathered a lot of food for the winter.",
            "{h} had a full basket, and {his} favorite food was {food}.",
            "One day {h} found a whole basket of {food}.",
        ),
        w.pick(
            '"This is all mine," {he} said and hid it behind {feature}.',
            "{He} did not want to give any of it away.",
            '"I will not share with anybody," {he} thought.',
        ),
        meeting(w),
        w.pick(
            '"I am so hungry," said {f}. "Do you have something to eat?"',
            "{f} was thin and cold and had not eaten for days.",
            '"Could I have a little bit?" asked {f} politely.',
        ),
        w.pick(
            '"No," said {h}, and {f} went away without a word.',
            "{h} shook {his} head, and {f} walked away sadly.",
        ),
        w.pick(
            "But that night {h} could not sleep. The food did not taste good anymore.",
            "But eating alone was boring, and {h} thought of {f}'s sad eyes.",
            "Then a storm came and blew the roof off {h}'s house. {f} was the first who came to help.",
        ),
        w.pick(
            'So {he} ran after {f} and called, "Come back, let us eat together!"',
            "The next morning {h} went to {f} and brought half of the food.",
            '"I am sorry," {h} told {f}. "Please eat with me."',
        ),
        w.pick(
            "They sat down by {feature} and ate until they were full.",
            "They made a fire and shared everything.",
            "{f} brought nuts, {h} brought the rest, and it became a feast.",
        ),
        w.pick(
            "There was still enough for the whole winter.",
            "It was the best meal that {h} ever had.",
            "From then on they shared every meal.",
        ),
    ], "share"


def fear(w: World) -> tuple[list[str], str]:
    what, truth = w.rng.choice(
        (
            ("a strange noise in the night", "an old door that moved in the wind"),
            ("a dark shadow on the wall", "the shadow of a small tree"),
            ("two shining eyes in the dark", "a pair of fireflies"),
            ("a deep growl behind {feature}", "{f} the {fk}, who was snoring"),
            ("a white ghost between the {plants}", "a sheet that had blown off the line"),
            ("loud steps on the roof", "rain that fell on the tiles"),
            ("a long snake on the path", "only a piece of rope"),
        )
    )
    return [
        w.pick(
            "{h} was afraid of the dark.",
            "There was only one thing that {h} did not like: the night.",
            "One night {h} was alone at home.",
        ),
        w.pick(
            f"One night {{he}} noticed {what}.",
            f"When the moon rose, there was {what}.",
            f"Suddenly there was {what}.",
        ),
        w.pick(
            "{His} heart beat fast and {he} hid under the bed.",
            "{He} wanted to run away.",
            "{He} held {his} breath and did not move.",
        ),
        w.pick(
            "But {he} also wanted to know what it was.",
            'Then {he} said to {himself}, "I must be brave."'.replace(
                "{himself}", w.h.them + "self"
            ),
            "{He} waited for a long time, but it did not go away.",
        ),
        w.pick(
            "So {he} took {athing} in {his} hand and went outside.",
            "So {he} lit a lamp and went to look.",
            "Slowly, step by step, {he} went closer.",
        ),
        w.pick(f"It was {truth}!", f"And what did {{he}} find? It was {truth}!"),
        w.pick(
            "{h} laughed so loudly that everyone woke up.",
            "{h} had to laugh at {his} own fear.",
            "{h} felt light and happy.",
        ),
        w.pick(
            "The next day {he} told {f} the {fk} about it, and they laughed together.",
            '"You were very brave," said {f} the {fk} the next morning.',
            "From then on, {h} slept well every night.",
        ),
    ], "fear"


def honest(w: World) -> tuple[list[str], str]:
    return [
        w.pick(
            "{f} the {fk} had {athing} that was very beautiful.",
            "{h}'s neighbor was {f}, {afk}, who owned {athing}.",
        ),
        w.pick(
            "One day {h} borrowed it without asking.",
            "{h} liked it so much that {he} secretly took it to play.",
            "While {f} was away, {h} only wanted to look at it.",
        ),
        w.pick(
            "But {he} dropped it, and the {thing} broke.",
            "But {he} was not careful, and the {thing} fell into the water.",
            "Then {he} stumbled over a root, and the {thing} was damaged.",
        ),
        w.pick(
            '"Who did this?" asked {f} in the evening. {h} said nothing.',
            '"It was the wind," said {h} when {f} asked.',
            "{h} hid it behind {feature} and told nobody.",
        ),
        w.pick(
            "But the lie was heavy like a stone, and {h} could not eat.",
            "All night {h} thought about it and could not sleep.",
            "From then on {h} did not dare to look at {f}.",
        ),
        w.pick(
            'At last {he} went to {f} and said, "It was me. I am sorry."',
            "In the morning {he} knocked at {f}'s door and told the truth.",
        ),
        w.pick(
            '{f} was quiet for a moment. Then {she} said, "Thank you for telling me."',
            '"I am sad about the {thing}," said {f}, "but I am glad that you told me."',
        ),
        w.pick(
            "Together they repaired it, and it looked almost like new.",
            "{h} worked for three days and made a new one.",
            "They fixed the {thing} with glue and a lot of patience.",
        ),
        w.pick(
            "And {h} never took anything without asking again.",
            "Since that day they trusted each other even more.",
        ),
    ], "truth"


def kindness(w: World) -> tuple[list[str], str]:
    trouble, free = w.rng.choice(
        (
            ("was caught in a net", "bit through the ropes"),
            ("had a thorn in the foot", "pulled the thorn out"),
            ("had fallen into a deep hole", "let down a long branch"),
            ("was stuck in the mud", "pulled with all strength"),
            ("had lost the way home", "showed the right path"),
            ("was trapped behind a fallen tree", "pushed the tree aside"),
        )
    )
    danger, rescue = w.rng.choice(
        (
            ("{h} was caught by a big storm", "led {him} to a safe cave"),
            ("{h} fell into the river", "pulled {him} out of the water"),
            ("{h} was lost in the dark", "came with a lamp and brought {him} home"),
            ("{h} was ill and could not get up", "brought {him} soup every day"),
            ("a fire broke out near {h}'s home", "came with all {hers} friends to put it out"),
        )
    )
    return [
        w.pick(
            "One day {he} heard someone calling for help.",
            "One morning, on the way to {feature}, {he} heard a soft cry.",
        ),
        w.pick(
            f"It was {{f}} the {{fk}}, who {trouble}.",
            f"There was {{f}}, {{afk}}, who {trouble}.",
        ),
        w.pick(
            "Others had walked past, but {h} stopped.",
            '"Do not be afraid," said {h}. "I will help you."',
            "{h} was late already, but {he} did not think twice.",
        ),
        w.pick(
            f"{{He}} {free}, and {{f}} was free."
            if "way home" not in trouble
            else f"{{He}} {free}, and {{f}} came home safely."
        ),
        w.pick(
            '"One day I will help you too," promised {f}.',
            '"I will never forget this," said {f}.',
            "{f} thanked {him} with tears in {hers} eyes.",
        ),
        w.pick(
            "Many weeks went by.", "Summer passed and winter came.", "{h} soon forgot about it."
        ),
        w.pick(f"Then, one night, {danger}.", f"But one day {danger}."),
        w.pick(f"And who came? It was {{f}}, who {rescue}.", f"{{f}} heard it and {rescue}."),
        w.pick(
            '"Now we are even," said {f} with a smile.',
            '"You helped me first," said {f}.',
            "{h} thanked {her} again and again.",
        ),
    ], "kind"


def journey(w: World) -> tuple[list[str], str]:
    goal, found = w.rng.choice(
        (
            ("the place where the rainbow ends", "a warm house full of friends"),
            ("the top of the highest mountain", "a view over the whole land"),
            ("the biggest tree in the world", "a tree so wide that ten could not reach around it"),
            ("the sea", "waves that glittered like silver"),
            ("the moon", "its picture in a still pond"),
            ("a land where it never rains", "a dry land where nothing grew"),
            ("the wise old owl", "an owl who knew every answer"),
        )
    )
    return [
        w.pick(
            f"One day {{h}} wanted to see {goal}.",
            f"{{h}} had always dreamed of {goal}.",
            f'"I am going to find {goal}," said {{h}} one morning.',
        ),
        w.pick(
            "{He} packed {athing} and some {food} and set off.",
            "{He} took only {athing} and went on {his} way.",
            "With {athing} under {his} arm, {he} said goodbye to everyone.",
        ),
        w.rng.choice(WEATHER),
        meeting(w),
        w.pick(
            '"May I come with you?" asked {f}. "Gladly," said {h}.',
            '"The way is long," said {f}. "Let me go with you."',
        ),
        w.pick(
            "They crossed a river, and {f} carried the bags.",
            "When {h} was tired, {f} told a funny story.",
            "They slept under the stars and shared the {food}.",
        ),
        w.pick(
            "On the second day they lost the way, but the {thing} helped them.",
            "A high wall stood in the way, but together they got over it.",
            "It became steep, and more than once they wanted to turn back.",
        ),
        w.pick(f"At last they found {found}.", f"On the seventh day they saw it: {found}."),
        w.pick(
            '"It was worth every step," said {h}.',
            '"The best part was the way with you," {h} told {f}.',
            "They stayed until evening and then walked home happily.",
        ),
    ], "help"


PLOTS = (lost, learn, share, fear, honest, kindness, journey)
CLOSINGS = (
    "And they lived happily ever after.",
    "The end.",
    "And if you go there today, you may still see them.",
    "",
    "",
    "",
)


def title(w: World) -> str:
    """A title that names the hero."""
    return w.pick(
        "{h} the {hk}",
        "The {trait} {hk}",
        "{h} and {f}",
        "The {hk} and the {fk}",
        "{h} and the {thing}",
    )


def story(rng: Random, hero_kind: str, friend_kind: str) -> tuple[str, World]:
    """A story of about ten to fifteen sentences in three or four paragraphs."""
    taken: set[str] = set()
    where, feature, plants = rng.choice(PLACES)
    trait, _ = rng.choice(TRAITS)
    w = World(
        rng,
        hero(rng, hero_kind, taken),
        hero(rng, friend_kind, taken),
        where,
        feature,
        plants,
        trait,
        rng.choice(TREASURES),
        rng.choice(FOODS),
    )
    middle, moral = rng.choice(PLOTS)(w)
    sentences = opening(w)
    paragraphs = [" ".join(sentences)]
    cut = rng.randint(3, 5)
    paragraphs += [" ".join(middle[:cut]), " ".join(middle[cut:])]
    ending = [rng.choice(MORALS[moral])] if rng.random() < 0.7 else []
    closing = rng.choice(CLOSINGS)
    if closing:
        ending.append(closing)
    if ending:
        paragraphs.append(" ".join(ending))
    return "\n\n".join(paragraphs), w


ONE_FORMS = (
    "Tell me a story about {x}.",
    "Tell me a short story about {x}.",
    "Write a story about {x}.",
    "Write a short story about {x}.",
    "Can you tell me a story about {x}?",
    "Please tell me a story about {x}.",
    "I want to hear a story about {x}.",
    "Make up a story about {x}.",
    "A story about {x}, please.",
    "tell me a story about {x}",
    "Tell me a bedtime story about {x}.",
    "Once upon a time there was {x}. What happened?",
)
NO_FORMS = (
    "Tell me a story.",
    "Tell me a short story.",
    "Can you tell me a story?",
    "I would like to hear a story.",
    "Write a short story.",
    "Tell me a bedtime story, please.",
    "tell me a story",
)


def story_chat(rng: Random) -> Chat:
    """A request for a story and the story; sometimes with a plan in the thoughts."""
    kinds = ANIMALS + BEINGS
    hero_kind, friend_kind = rng.sample(kinds, 2)
    text, w = story(rng, hero_kind, friend_kind)
    form = rng.random()
    if form < 0.12:
        question = rng.choice(NO_FORMS)
    elif form < 0.62:
        question = rng.choice(ONE_FORMS).format(x=a(hero_kind))
    elif form < 0.75:
        question = rng.choice(ONE_FORMS).format(x=f"{a(hero_kind)} and {a(friend_kind)}")
    elif form < 0.88:
        question = rng.choice(ONE_FORMS).format(x=f"{a(hero_kind)} named {w.h.name}")
    else:
        question = rng.choice(ONE_FORMS).format(x=f"{a(w.trait)} {hero_kind}")
    if rng.random() < 0.2:
        text = f"{title(w)}\n\n{text}"
    chat = Chat.ask(question, text, kind="story")
    if rng.random() < 0.2:
        chat.thoughts = (
            f"A story about {a(hero_kind)}. The hero is {w.h.name}, {a(w.trait)} {hero_kind}, "
            f"{w.where}. A friend: {w.f.name} the {friend_kind}."
        )
    chat.expected = {"hero": hero_kind, "friend": friend_kind}
    return chat
