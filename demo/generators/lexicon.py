"""Word lists shared by the generators."""

NAMES = (
    "Anna Ben Clara David Ella Finn Grace Henry Ivy Jack Kate Leo Mia Noah Olive Paul Rosa Sam Tina "
    "Tom Lily Max Nora Oscar Ruby Hugo Zoe Emma Lucas Sara Omar Aisha Yuki Kenji Maya Ravi Priya "
    "Diego Elena Marco Sofia Ingrid Lars Amara Kofi Mei Wei Nadia Ivan Greta Felix Hannah"
).split()

#: animal -> (pronoun words come from the name), adjectives that suit a story
ANIMALS = (
    "fox bear rabbit mouse owl hedgehog squirrel frog turtle wolf cat dog duck crow deer badger otter "
    "beaver goose penguin elephant lion tiger monkey giraffe zebra hippo parrot sparrow snail "
    "ant bee butterfly spider horse pony cow sheep goat pig donkey hen whale dolphin crab seal mole "
    "bat lizard camel kangaroo koala panda swan raven"
).split()

BEINGS = "robot dragon knight wizard fairy giant pirate princess king sailor baker farmer".split()

FRUITS = (
    "apple pear plum cherry peach orange lemon banana grape melon mango fig lime berry apricot kiwi"
).split()

THINGS = (
    "apples pencils books marbles coins shells stickers cards stamps cookies eggs flowers balloons "
    "stones buttons oranges toys cups plates candles"
).split()

SORT_WORDS = (
    "apple bread cloud door eagle flame garden house island jacket kettle lemon mirror needle ocean "
    "paper queen river stone table umbrella violin water yellow zebra anchor basket candle desert "
    "engine forest guitar hammer insect jungle kitten ladder market nest orange pencil rabbit silver "
    "tiger uncle valley window yard bridge castle dragon finger glass honey ink juice king lamp moon "
    "night oven plant quilt rain sand train village wheel"
).split()

CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Warsaw Oslo Stockholm Helsinki Copenhagen Dublin "
    "Lisbon Athens Budapest Brussels Amsterdam Zurich Geneva Munich Hamburg Barcelona Milan Naples "
    "Tokyo Osaka Kyoto Seoul Beijing Shanghai Delhi Mumbai Bangkok Hanoi Manila Jakarta Singapore "
    "Sydney Melbourne Perth Auckland Wellington Cairo Nairobi Lagos Accra Tunis Casablanca Dakar "
    "Toronto Montreal Vancouver Chicago Boston Seattle Denver Miami Dallas Houston Phoenix Portland "
    "Lima Bogota Quito Santiago Havana Caracas Istanbul Ankara Dubai Doha Riyadh Tehran Baghdad Kyiv "
    "Edinburgh Glasgow Liverpool Manchester Lyon Nice Florence Venice Turin Seville Porto Krakow"
).split()
