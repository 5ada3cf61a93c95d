"""The words of logic-grid puzzles: what people differ in, and what each clue says."""

from typing import NamedTuple


class Attribute(NamedTuple):
    """One column of a grid.

    Attributes:
        about: what its values are, after "the".
        person: how a clue speaks of the person with the value "{}".
    """

    about: str
    person: str
    values: tuple[str, ...]


# Written for this library. Every attribute has values of its own, so that no clue can be read
# as speaking of another column.
ATTRIBUTES = {
    "Name": Attribute(
        "name of each person",
        "{}",
        ("Ada", "Boris", "Chloe", "Dmitri", "Elena", "Farid", "Greta", "Hugo"),
    ),
    "Pet": Attribute(
        "animal that each person keeps",
        "the person who keeps a {}",
        ("cat", "dog", "horse", "rabbit", "parrot", "hamster", "turtle", "goldfish"),
    ),
    "Drink": Attribute(
        "favorite drink of each person",
        "the {} drinker",
        ("tea", "coffee", "milk", "water", "juice", "cocoa", "lemonade", "cider"),
    ),
    "Color": Attribute(
        "favorite color of each person",
        "the person whose favorite color is {}",
        ("red", "blue", "green", "yellow", "white", "black", "purple", "brown"),
    ),
    "Food": Attribute(
        "favorite food of each person",
        "the {} lover",
        ("pizza", "soup", "curry", "salad", "pasta", "rice", "stew", "sushi"),
    ),
    "Job": Attribute(
        "job of each person",
        "the {}",
        ("baker", "doctor", "farmer", "lawyer", "pilot", "sailor", "teacher", "writer"),
    ),
    "Hobby": Attribute(
        "hobby of each person",
        "the person whose hobby is {}",
        ("chess", "painting", "gardening", "knitting", "cooking", "hiking", "origami", "yoga"),
    ),
    "Flower": Attribute(
        "flowers that each person grows",
        "the person who grows {}",
        ("roses", "tulips", "lilies", "daisies", "orchids", "violets", "irises", "poppies"),
    ),
    "Instrument": Attribute(
        "instrument that each person plays",
        "the person who plays the {}",
        ("piano", "violin", "flute", "cello", "guitar", "trumpet", "drums", "harp"),
    ),
    "Transport": Attribute(
        "way in which each person gets to work",
        "the person who goes to work by {}",
        ("bicycle", "bus", "car", "ferry", "motorbike", "scooter", "train", "tram"),
    ),
    "Country": Attribute(
        "country that each person comes from",
        "the person from {}",
        ("Brazil", "Canada", "Egypt", "France", "India", "Japan", "Kenya", "Norway"),
    ),
    "Birthday": Attribute(
        "month in which each person was born",
        "the person born in {}",
        ("January", "February", "March", "April", "May", "June", "July", "August"),
    ),
}

CLUES = {
    "found": "{x} lives in the {place} house.",
    "not": "{x} does not live in the {place} house.",
    "same": "{x} is {y}.",
    "next": "{x} lives immediately to the left of {y}.",
    "beside": "{x} and {y} live next door to each other.",
    "left": "{x} lives somewhere to the left of {y}.",
    "right": "{y} lives somewhere to the right of {x}.",  # the same as "left", in other words
    "gap1": "There is exactly one house between the homes of {x} and {y}.",
    "gap2": "There are exactly two houses between the homes of {x} and {y}.",
}
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth")

OPENING = (
    "There are {n} houses in a row, numbered 1 to {n} from left to right. One person lives in "
    "each house, and no two of these people agree in any of the following:"
)


def person(column: str, value: str) -> str:
    """How a clue speaks of the one who has this value."""
    return ATTRIBUTES[column].person.format(value)


def sentence(text: str) -> str:
    """`text` with a capital first letter."""
    return text[0].upper() + text[1:]
