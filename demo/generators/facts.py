# ruff: noqa: E501  tables of sentences, one a line
"""Simple facts with many wordings of the question.

A fact is (key, wordings, answer sentence, the word or words a checker looks for). Some
combinations of fact and wording are held out by hash, so that the evaluation asks about known
facts in a wording not seen with that fact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from demo.chat import Chat
from demo.split import held_out

CAPITALS = """
France:Paris Germany:Berlin Spain:Madrid Italy:Rome Portugal:Lisbon Austria:Vienna Belgium:Brussels
Netherlands:Amsterdam Switzerland:Bern Poland:Warsaw Hungary:Budapest Romania:Bucharest
Bulgaria:Sofia Greece:Athens Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen
Iceland:Reykjavik Ireland:Dublin England:London Scotland:Edinburgh Wales:Cardiff Ukraine:Kyiv
Russia:Moscow Estonia:Tallinn Latvia:Riga Lithuania:Vilnius Croatia:Zagreb Serbia:Belgrade
Slovenia:Ljubljana Slovakia:Bratislava Albania:Tirana Turkey:Ankara Cyprus:Nicosia Malta:Valletta
Egypt:Cairo Morocco:Rabat Algeria:Algiers Tunisia:Tunis Libya:Tripoli Sudan:Khartoum Kenya:Nairobi
Ethiopia:Addis_Ababa Uganda:Kampala Ghana:Accra Nigeria:Abuja Senegal:Dakar Mali:Bamako
Angola:Luanda Zambia:Lusaka Zimbabwe:Harare Namibia:Windhoek Rwanda:Kigali Japan:Tokyo
China:Beijing India:New_Delhi Pakistan:Islamabad Nepal:Kathmandu Thailand:Bangkok Vietnam:Hanoi
Cambodia:Phnom_Penh Laos:Vientiane Indonesia:Jakarta Malaysia:Kuala_Lumpur Philippines:Manila
Mongolia:Ulaanbaatar South_Korea:Seoul Iran:Tehran Iraq:Baghdad Syria:Damascus Lebanon:Beirut
Jordan:Amman Saudi_Arabia:Riyadh Qatar:Doha Oman:Muscat Afghanistan:Kabul Kazakhstan:Astana
Australia:Canberra New_Zealand:Wellington Fiji:Suva Canada:Ottawa Mexico:Mexico_City Cuba:Havana
Jamaica:Kingston Guatemala:Guatemala_City Panama:Panama_City Colombia:Bogota Venezuela:Caracas
Ecuador:Quito Peru:Lima Chile:Santiago Argentina:Buenos_Aires Uruguay:Montevideo Paraguay:Asuncion
Brazil:Brasilia
"""
CONTINENTS = """
France:Europe Germany:Europe Spain:Europe Italy:Europe Poland:Europe Norway:Europe Greece:Europe
Egypt:Africa Kenya:Africa Nigeria:Africa Morocco:Africa Ghana:Africa Ethiopia:Africa Japan:Asia
China:Asia India:Asia Thailand:Asia Vietnam:Asia Nepal:Asia Mongolia:Asia Canada:North_America
Mexico:North_America Cuba:North_America Brazil:South_America Peru:South_America
Chile:South_America Argentina:South_America
"""
LANGUAGES = """
France:French Germany:German Spain:Spanish Italy:Italian Portugal:Portuguese Japan:Japanese
China:Chinese Brazil:Portuguese Mexico:Spanish Austria:German Poland:Polish Greece:Greek
Turkey:Turkish Russia:Russian Sweden:Swedish Norway:Norwegian Finland:Finnish Hungary:Hungarian
Egypt:Arabic Iran:Persian Thailand:Thai Vietnam:Vietnamese Denmark:Danish Argentina:Spanish
"""
CURRENCIES = """
France:euro Germany:euro Japan:yen England:pound China:yuan India:rupee Russia:ruble Poland:zloty
Sweden:krona Switzerland:franc Mexico:peso Brazil:real Turkey:lira Thailand:baht Denmark:krone
Hungary:forint Vietnam:dong South_Korea:won Canada:dollar Australia:dollar
"""
SOUNDS = """
cat:meows dog:barks cow:moos pig:oinks sheep:bleats horse:neighs duck:quacks lion:roars
wolf:howls frog:croaks owl:hoots rooster:crows bee:buzzes snake:hisses mouse:squeaks
donkey:brays hen:clucks crow:caws elephant:trumpets turkey:gobbles pigeon:coos
"""
YOUNG = """
cat:kitten dog:puppy cow:calf horse:foal sheep:lamb pig:piglet goat:kid hen:chick duck:duckling
goose:gosling swan:cygnet lion:cub bear:cub wolf:pup fox:kit deer:fawn frog:tadpole
kangaroo:joey owl:owlet eagle:eaglet butterfly:caterpillar whale:calf elephant:calf rabbit:kit
"""
LEGS = """
dog:four cat:four horse:four cow:four spider:eight ant:six bee:six butterfly:six chicken:two
duck:two person:two crab:ten octopus:eight*arms snake:no fish:no elephant:four beetle:six
"""
HOMES = """
bee:hive bird:nest spider:web bear:den rabbit:burrow dog:kennel horse:stable pig:sty ant:anthill
beaver:lodge lion:den cow:barn hen:coop fox:den
"""
EATS = """
cow:grass panda:bamboo rabbit:grass_and_carrots koala:eucalyptus_leaves lion:meat squirrel:nuts
bee:nectar caterpillar:leaves shark:fish giraffe:leaves penguin:fish mosquito:blood horse:hay
anteater:ants
"""
KINDS = """
dog:mammal whale:mammal dolphin:mammal bat:mammal elephant:mammal eagle:bird penguin:bird owl:bird
salmon:fish shark:fish tuna:fish frog:amphibian toad:amphibian salamander:amphibian snake:reptile
lizard:reptile crocodile:reptile turtle:reptile ant:insect bee:insect butterfly:insect
spider:arachnid scorpion:arachnid horse:mammal parrot:bird lobster:crustacean crab:crustacean
"""
COLOURS = """
sky:blue grass:green snow:white blood:red banana:yellow lemon:yellow coal:black carrot:orange
strawberry:red cucumber:green milk:white tomato:red night:black emerald:green ruby:red
sapphire:blue chocolate:brown pumpkin:orange lime:green sunflower:yellow flamingo:pink crow:black
polar_bear:white canary:yellow cherry:red
"""
MIXES = """
red+yellow:orange blue+yellow:green red+blue:purple red+white:pink black+white:grey
yellow+blue:green yellow+red:orange blue+red:purple white+red:pink white+black:grey
"""
COUNTS = """
days_in_a_week:seven days_in_a_year:365 days_in_a_leap_year:366 months_in_a_year:twelve
hours_in_a_day:24 minutes_in_an_hour:sixty seconds_in_a_minute:sixty weeks_in_a_year:52
seasons_in_a_year:four letters_in_the_English_alphabet:26 vowels_in_the_English_alphabet:five
sides_on_a_triangle:three sides_on_a_square:four sides_on_a_pentagon:five sides_on_a_hexagon:six
sides_on_an_octagon:eight continents_on_Earth:seven oceans_on_Earth:five
planets_in_the_solar_system:eight colours_in_a_rainbow:seven strings_on_a_violin:four
strings_on_a_guitar:six keys_on_a_piano:88 fingers_on_a_hand:five toes_on_a_foot:five
cents_in_a_dollar:100 items_in_a_dozen:twelve years_in_a_decade:ten years_in_a_century:100
years_in_a_millennium:1000 centimetres_in_a_metre:100 metres_in_a_kilometre:1000
grams_in_a_kilogram:1000 inches_in_a_foot:twelve degrees_in_a_circle:360 degrees_in_a_right_angle:90
players_in_a_football_team:eleven wheels_on_a_bicycle:two wheels_on_a_tricycle:three
wheels_on_a_car:four squares_on_a_chessboard:64 cards_in_a_deck:52 bones_in_the_human_body:206
hearts_of_an_octopus:three bits_in_a_byte:eight teeth_of_an_adult:32
"""
ELEMENTS = """
hydrogen:H helium:He lithium:Li carbon:C nitrogen:N oxygen:O fluorine:F neon:Ne sodium:Na
magnesium:Mg aluminium:Al silicon:Si phosphorus:P sulfur:S chlorine:Cl argon:Ar potassium:K
calcium:Ca iron:Fe nickel:Ni copper:Cu zinc:Zn silver:Ag tin:Sn iodine:I gold:Au mercury:Hg
lead:Pb uranium:U platinum:Pt
"""
NUMBERS = """
hydrogen:1 helium:2 lithium:3 carbon:6 nitrogen:7 oxygen:8 neon:10 sodium:11 aluminium:13
sulfur:16 chlorine:17 calcium:20 iron:26 copper:29 zinc:30 silver:47 gold:79
"""
OPPOSITES = """
hot:cold big:small fast:slow tall:short day:night up:down left:right in:out open:closed happy:sad
light:dark old:young new:old rich:poor hard:soft wet:dry full:empty high:low long:short near:far
early:late strong:weak good:bad clean:dirty loud:quiet thick:thin heavy:light true:false
begin:end win:lose love:hate push:pull buy:sell give:take sharp:blunt sweet:sour wide:narrow
deep:shallow safe:dangerous easy:difficult cheap:expensive always:never first:last north:south
east:west summer:winter inside:outside above:below before:after brave:cowardly
"""
PLURALS = """
mouse:mice child:children man:men woman:women foot:feet tooth:teeth goose:geese person:people
ox:oxen leaf:leaves knife:knives wolf:wolves sheep:sheep fish:fish city:cities baby:babies
box:boxes bus:buses potato:potatoes cactus:cacti
"""
PASTS = """
go:went eat:ate see:saw run:ran come:came take:took give:gave write:wrote speak:spoke swim:swam
fly:flew drink:drank buy:bought think:thought teach:taught find:found sing:sang sleep:slept
break:broke know:knew begin:began drive:drove make:made say:said bring:brought catch:caught
"""
WRITERS = """
Hamlet:William_Shakespeare Macbeth:William_Shakespeare Romeo_and_Juliet:William_Shakespeare
Don_Quixote:Miguel_de_Cervantes War_and_Peace:Leo_Tolstoy Oliver_Twist:Charles_Dickens
A_Christmas_Carol:Charles_Dickens Pride_and_Prejudice:Jane_Austen Emma:Jane_Austen
Frankenstein:Mary_Shelley Dracula:Bram_Stoker Moby-Dick:Herman_Melville The_Odyssey:Homer
The_Iliad:Homer Alice_in_Wonderland:Lewis_Carroll Treasure_Island:Robert_Louis_Stevenson
The_Time_Machine:H._G._Wells The_Jungle_Book:Rudyard_Kipling Faust:Goethe
Peter_Pan:J._M._Barrie Crime_and_Punishment:Fyodor_Dostoevsky Les_Miserables:Victor_Hugo
The_Divine_Comedy:Dante Jane_Eyre:Charlotte_Bronte Pinocchio:Carlo_Collodi 1984:George_Orwell
"""
PAINTERS = """
the_Mona_Lisa:Leonardo_da_Vinci The_Starry_Night:Vincent_van_Gogh Guernica:Pablo_Picasso
The_Scream:Edvard_Munch The_Kiss:Gustav_Klimt The_Night_Watch:Rembrandt
The_Birth_of_Venus:Sandro_Botticelli Water_Lilies:Claude_Monet The_Last_Supper:Leonardo_da_Vinci
"""
INVENTORS = """
the_telephone:Alexander_Graham_Bell the_light_bulb:Thomas_Edison
the_printing_press:Johannes_Gutenberg dynamite:Alfred_Nobel penicillin:Alexander_Fleming
the_World_Wide_Web:Tim_Berners-Lee radium:Marie_Curie gravity:Isaac_Newton Python:Guido_van_Rossum
Linux:Linus_Torvalds the_theory_of_relativity:Albert_Einstein
"""
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]
ORDINALS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
]

SINGLE = """
What is the largest planet in the solar system?|The largest planet in the solar system is Jupiter.|Jupiter
What is the smallest planet in the solar system?|The smallest planet in the solar system is Mercury.|Mercury
What is the largest ocean on Earth?|The largest ocean on Earth is the Pacific Ocean.|Pacific
What is the largest animal in the world?|The largest animal in the world is the blue whale.|blue whale
What is the fastest land animal?|The fastest land animal is the cheetah.|cheetah
What is the tallest animal?|The tallest animal is the giraffe.|giraffe
What is the highest mountain in the world?|The highest mountain in the world is Mount Everest.|Everest
What is the longest river in the world?|The longest river in the world is the Nile.|Nile
What is the largest country in the world?|The largest country in the world is Russia.|Russia
What is the smallest country in the world?|The smallest country in the world is Vatican City.|Vatican
What is the largest desert made of sand?|The largest sandy desert is the Sahara.|Sahara
What is the hardest natural material?|The hardest natural material is diamond.|diamond
What is the chemical formula of water?|The chemical formula of water is H2O.|H2O
What gas do plants take in?|Plants take in carbon dioxide.|carbon dioxide
What gas do people need to breathe?|People need oxygen to breathe.|oxygen
What star is closest to Earth?|The star closest to Earth is the Sun.|Sun
What planet is known as the red planet?|The red planet is Mars.|Mars
Which planet has big rings?|Saturn has big rings.|Saturn
What goes around the Earth?|The Moon goes around the Earth.|Moon
What does the Earth go around?|The Earth goes around the Sun.|Sun
At what temperature does water boil?|Water boils at 100 degrees Celsius.|100
At what temperature does water freeze?|Water freezes at 0 degrees Celsius.|0
What do bees make?|Bees make honey.|honey
What is bread made from?|Bread is made from flour.|flour
What is cheese made from?|Cheese is made from milk.|milk
What is paper made from?|Paper is made from wood.|wood
What is glass made from?|Glass is made from sand.|sand
What is wine made from?|Wine is made from grapes.|grapes
What is chocolate made from?|Chocolate is made from cocoa beans.|cocoa
What is ice made of?|Ice is made of frozen water.|water
What is frozen water called?|Frozen water is called ice.|ice
What does a doctor do?|A doctor treats people who are ill.|ill
What does a baker do?|A baker makes bread and cakes.|bread
What does a teacher do?|A teacher helps pupils learn.|learn
What does a farmer do?|A farmer grows food and keeps animals.|food
What does a pilot do?|A pilot flies planes.|planes
What does a thermometer measure?|A thermometer measures temperature.|temperature
What does a clock measure?|A clock measures time.|time
What does a barometer measure?|A barometer measures air pressure.|pressure
What does CPU stand for?|CPU stands for central processing unit.|central processing unit
What does GPU stand for?|GPU stands for graphics processing unit.|graphics processing unit
What does RAM stand for?|RAM stands for random access memory.|random access memory
What does HTML stand for?|HTML stands for HyperText Markup Language.|HyperText Markup Language
What does MoE stand for?|MoE stands for mixture of experts.|mixture of experts
What does MLA stand for?|MLA stands for multi-head latent attention.|latent attention
What does MTP stand for?|MTP stands for multi-token prediction.|multi-token prediction
Where does the Sun rise?|The Sun rises in the east.|east
Where does the Sun set?|The Sun sets in the west.|west
What is the square root of 81?|The square root of 81 is 9.|9
What is the square root of 144?|The square root of 144 is 12.|12
What is the first letter of the alphabet?|The first letter of the alphabet is A.|A
What is the last letter of the alphabet?|The last letter of the alphabet is Z.|Z
When do leaves fall?|Leaves fall in autumn.|autumn
In what season does it snow?|It snows in winter.|winter
Where do fish live?|Fish live in water.|water
Where do penguins live?|Penguins live in the south, many of them in Antarctica.|Antarctica
Where do polar bears live?|Polar bears live in the Arctic.|Arctic
Where do kangaroos live?|Kangaroos live in Australia.|Australia
Where is the Eiffel Tower?|The Eiffel Tower is in Paris.|Paris
Where is the Colosseum?|The Colosseum is in Rome.|Rome
Where is Big Ben?|Big Ben is in London.|London
Where is the Statue of Liberty?|The Statue of Liberty is in New York.|New York
Where are the pyramids of Giza?|The pyramids of Giza are in Egypt.|Egypt
Where is the Great Wall?|The Great Wall is in China.|China
Where is the Taj Mahal?|The Taj Mahal is in India.|India
Where is Machu Picchu?|Machu Picchu is in Peru.|Peru
Where is the Brandenburg Gate?|The Brandenburg Gate is in Berlin.|Berlin
"""


@dataclass(frozen=True)
class Fact:
    """One fact: a key, the wordings of its question, the answer, what a checker looks for."""

    key: str
    questions: tuple[str, ...]
    answer: str
    must_say: str


def _pairs(table: str) -> list[tuple[str, str]]:
    pairs = []
    for item in table.split():
        left, right = item.rsplit(":", 1)
        pairs.append((left.replace("_", " "), right.replace("_", " ")))
    return pairs


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def _country(name: str) -> str:
    return "the " + name if name in ("Netherlands", "Philippines") else name


def _build() -> list[Fact]:
    facts: list[Fact] = []

    def table(
        kind: str,
        text: str,
        forms: tuple[str, ...],
        answer: str,
        show: Callable[[str], str] = lambda x: x,
    ) -> None:
        for key, value in _pairs(text):
            k = show(key)
            questions = tuple(f.format(k=k, v=value) for f in forms)
            sentence = answer.format(k=k, v=value, av=a(value))
            sentence = sentence[0].upper() + sentence[1:]
            facts.append(Fact(f"{kind}/{key}", questions, sentence, value))

    table(
        "capital",
        CAPITALS,
        (
            "What is the capital of {k}?",
            "What's the capital of {k}?",
            "Which city is the capital of {k}?",
            "Name the capital of {k}.",
            "Tell me the capital of {k}.",
            "What is the capital city of {k}?",
            "Do you know the capital of {k}?",
            "capital of {k}?",
        ),
        "The capital of {k} is {v}.",
        _country,
    )
    for country, city in _pairs(CAPITALS):
        if country in ("England", "Scotland", "Wales"):
            continue
        facts.append(
            Fact(
                f"capital-of/{city}",
                (
                    f"{city} is the capital of which country?",
                    f"Which country has {city} as its capital?",
                    f"Of what country is {city} the capital?",
                    f"What country is {city} the capital of?",
                ),
                f"{city} is the capital of {_country(country)}.",
                country,
            )
        )
    table(
        "continent",
        CONTINENTS,
        (
            "On which continent is {k}?",
            "Which continent is {k} in?",
            "What continent is {k} on?",
            "In which part of the world is {k}?",
            "Tell me what continent {k} belongs to.",
        ),
        "{k} is in {v}.",
    )
    table(
        "language",
        LANGUAGES,
        (
            "What language do people speak in {k}?",
            "Which language is spoken in {k}?",
            "What is the main language of {k}?",
            "What do they speak in {k}?",
        ),
        "People in {k} speak {v}.",
    )
    table(
        "currency",
        CURRENCIES,
        (
            "What is the currency of {k}?",
            "Which currency is used in {k}?",
            "What money do people use in {k}?",
            "What do people pay with in {k}?",
        ),
        "The currency of {k} is the {v}.",
    )
    table(
        "sound",
        SOUNDS,
        (
            "What sound does {k} make?",
            "What noise does {k} make?",
            "How does {k} sound?",
            "Which sound does {k} make?",
        ),
        "{k} {v}.",
        a,
    )
    table(
        "young",
        YOUNG,
        (
            "What is a baby {k} called?",
            "What do you call a baby {k}?",
            "What is a young {k} called?",
            "What's the name for a baby {k}?",
            "How do you call a young {k}?",
        ),
        "A baby {k} is called {av}.",
    )
    for key, value in _pairs(LEGS):
        part = "arms" if value.endswith("*arms") else "legs"
        value = value.removesuffix("*arms")
        subject = a(key)
        facts.append(
            Fact(
                f"legs/{key}",
                (
                    f"How many {part} does {subject} have?",
                    f"How many {part} has {subject}?",
                    f"What number of {part} does {subject} have?",
                    f"Tell me how many {part} {subject} has.",
                ),
                f"{subject[0].upper()}{subject[1:]} has {value} {part}.",
                value,
            )
        )
    table(
        "home",
        HOMES,
        (
            "Where does {k} live?",
            "What is the home of {k} called?",
            "In what does {k} live?",
            "What's the home of {k}?",
        ),
        "{k} lives in {av}.",
        a,
    )
    table(
        "eats",
        EATS,
        (
            "What does {k} eat?",
            "What is the food of {k}?",
            "What do you feed {k}?",
            "What does {k} like to eat?",
        ),
        "{k} eats {v}.",
        a,
    )
    table(
        "kind",
        KINDS,
        (
            "What kind of animal is {k}?",
            "What type of animal is {k}?",
            "To which group of animals does {k} belong?",
            "What sort of animal is {k}?",
        ),
        "{k} is {av}.",
        a,
    )
    for key, value in _pairs(COLOURS):
        noun = {"sky": "the sky", "night": "the night"}.get(key)
        mass = ("grass", "snow", "blood", "coal", "milk", "chocolate")
        noun = noun or (key if key in mass else a(key))
        facts.append(
            Fact(
                f"colour/{key}",
                (
                    f"What color is {noun}?",
                    f"What colour is {noun}?",
                    f"Which color does {noun} have?",
                    f"What is the color of {noun}?",
                    f"Tell me the colour of {noun}.",
                ),
                f"{noun[0].upper()}{noun[1:]} is {value}.",
                value,
            )
        )
    for key, value in _pairs(MIXES):
        one, two = key.split("+")
        facts.append(
            Fact(
                f"mix/{key}",
                (
                    f"What color do you get when you mix {one} and {two}?",
                    f"What do {one} and {two} make?",
                    f"Mix {one} and {two}. What color is it?",
                    f"Which colour comes from {one} and {two}?",
                ),
                f"When you mix {one} and {two}, you get {value}.",
                value,
            )
        )
    for key, value in _pairs(COUNTS):
        things, where = key.split(" ", 1)
        facts.append(
            Fact(
                f"count/{key}",
                (
                    f"How many {things} are there {where}?",
                    f"How many {things} {where}?",
                    f"What is the number of {things} {where}?",
                    f"Tell me how many {things} there are {where}.",
                    f"Do you know how many {things} there are {where}?",
                ),
                f"There are {value} {things} {where}.",
                value,
            )
        )
    table(
        "symbol",
        ELEMENTS,
        (
            "What is the chemical symbol for {k}?",
            "What is the symbol of {k}?",
            "What's the chemical symbol of {k}?",
            "Which symbol stands for {k}?",
            "Tell me the chemical symbol for {k}.",
        ),
        "The chemical symbol for {k} is {v}.",
    )
    for key, value in _pairs(ELEMENTS):
        facts.append(
            Fact(
                f"element/{value}",
                (
                    f"Which element has the symbol {value}?",
                    f"What element is {value}?",
                    f"What does the chemical symbol {value} stand for?",
                    f"Name the element with the symbol {value}.",
                ),
                f"{value} is the symbol for {key}.",
                key,
            )
        )
    table(
        "number",
        NUMBERS,
        (
            "What is the atomic number of {k}?",
            "What's the atomic number of {k}?",
            "Which atomic number does {k} have?",
            "Tell me the atomic number of {k}.",
        ),
        "The atomic number of {k} is {v}.",
    )
    table(
        "opposite",
        OPPOSITES,
        (
            "What is the opposite of {k}?",
            "What's the opposite of {k}?",
            'What is the opposite of "{k}"?',
            "Name the opposite of {k}.",
            "Tell me the opposite of {k}.",
            "opposite of {k}?",
        ),
        "The opposite of {k} is {v}.",
    )
    table(
        "plural",
        PLURALS,
        (
            "What is the plural of {k}?",
            "What's the plural of {k}?",
            'What is the plural of "{k}"?',
            "How do you say more than one {k}?",
        ),
        "The plural of {k} is {v}.",
    )
    table(
        "past",
        PASTS,
        (
            "What is the past tense of {k}?",
            "What's the past tense of {k}?",
            'What is the past tense of "{k}"?',
            "Give me the past tense of {k}.",
        ),
        "The past tense of {k} is {v}.",
    )
    table(
        "writer",
        WRITERS,
        (
            "Who wrote {k}?",
            "Who is the author of {k}?",
            "Which writer wrote {k}?",
            "Do you know who wrote {k}?",
            "{k} was written by whom?",
        ),
        "{k} was written by {v}.",
    )
    table(
        "painter",
        PAINTERS,
        (
            "Who painted {k}?",
            "Which artist painted {k}?",
            "Who is the painter of {k}?",
            "{k} was painted by whom?",
        ),
        "{k} was painted by {v}.",
    )
    for key, value in _pairs(INVENTORS):
        verb = {
            "the light bulb": "invented",
            "the telephone": "invented",
            "dynamite": "invented",
            "the printing press": "invented",
            "the World Wide Web": "invented",
            "Python": "created",
            "Linux": "created",
        }.get(key, "discovered")
        facts.append(
            Fact(
                f"inventor/{key}",
                (
                    f"Who {verb} {key}?",
                    f"Do you know who {verb} {key}?",
                    f"By whom was {key} {verb}?",
                    f"Tell me who {verb} {key}.",
                ),
                f"{key[0].upper()}{key[1:]} was {verb} by {value}.",
                value,
            )
        )
    rings: tuple[tuple[str, list[str]], ...] = (("month", MONTHS), ("day", DAYS))
    for unit, ring in rings:
        for i, name in enumerate(ring):
            after, before = ring[(i + 1) % len(ring)], ring[i - 1]
            facts.append(
                Fact(
                    f"after/{name}",
                    (
                        f"What {unit} comes after {name}?",
                        f"Which {unit} is after {name}?",
                        f"What comes after {name}?",
                        f"Which {unit} follows {name}?",
                    ),
                    f"{after} comes after {name}.",
                    after,
                )
            )
            facts.append(
                Fact(
                    f"before/{name}",
                    (
                        f"What {unit} comes before {name}?",
                        f"Which {unit} is before {name}?",
                        f"What comes before {name}?",
                        f"What is the {unit} before {name}?",
                    ),
                    f"{before} comes before {name}.",
                    before,
                )
            )
    for i, name in enumerate(MONTHS):
        days = "28" if name == "February" else "31" if i in (0, 2, 4, 6, 7, 9, 11) else "30"
        tail = " and 29 in a leap year" if name == "February" else ""
        facts.append(
            Fact(
                f"days/{name}",
                (
                    f"How many days does {name} have?",
                    f"How many days are in {name}?",
                    f"How many days are there in {name}?",
                    f"How long is {name}?",
                ),
                f"{name} has {days} days{tail}.",
                days,
            )
        )
        facts.append(
            Fact(
                f"month/{i}",
                (
                    f"What is the {ORDINALS[i]} month of the year?",
                    f"Which month is the {ORDINALS[i]}?",
                    f"What's the {ORDINALS[i]} month?",
                    f"Name the {ORDINALS[i]} month of the year.",
                ),
                f"The {ORDINALS[i]} month of the year is {name}.",
                name,
            )
        )
    for i, name in enumerate(PLANETS):
        facts.append(
            Fact(
                f"planet/{i}",
                (
                    f"What is the {ORDINALS[i]} planet from the Sun?",
                    f"Which planet is the {ORDINALS[i]} from the Sun?",
                    f"What's the {ORDINALS[i]} planet from the Sun?",
                    f"Name the {ORDINALS[i]} planet from the Sun.",
                ),
                f"The {ORDINALS[i]} planet from the Sun is {name}.",
                name,
            )
        )
    for line in SINGLE.strip().splitlines():
        question, answer, must_say = line.split("|")
        lower = question[0].lower() + question[1:]
        facts.append(
            Fact(
                f"single/{question}",
                (
                    question,
                    f"Tell me: {lower}",
                    f"Can you tell me {lower}",
                    question.lower(),
                    f"Question: {question}",
                    question.removesuffix("?"),
                ),
                answer,
                must_say,
            )
        )
    return facts


FACTS: list[Fact] = _build()


def gloss_facts(glosses: dict[str, str]) -> list[Fact]:
    """Facts from dictionary glosses: word to definition."""
    return [
        Fact(
            f"gloss/{word}",
            (
                f"What is {a(word)}?",
                f"What does {word} mean?",
                f'What does the word "{word}" mean?',
                f"Define {word}.",
                f"What is the meaning of {word}?",
                f"Give me a definition of {word}.",
            ),
            f"{a(word).capitalize()} is {text}.",
            text,
        )
        for word, text in glosses.items()
    ]


def is_held_out(fact: Fact, question: str) -> bool:
    """Whether this wording is kept out of training for this fact (one in six, never the first)."""
    return question != fact.questions[0] and held_out(f"fact {fact.key} {question}", 6)


def fact_chat(rng: Random, facts: list[Fact], held: bool) -> Chat:
    """A question about a fact; `held` asks for a wording not seen in training for that fact."""
    while True:
        fact = rng.choice(facts)
        questions = [q for q in fact.questions if is_held_out(fact, q) == held]
        if questions:
            break
    chat = Chat.ask(rng.choice(questions), fact.answer, kind="facts")
    chat.expected = {"answer": fact.answer, "must_say": fact.must_say, "key": fact.key}
    return chat
