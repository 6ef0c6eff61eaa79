"""Questions about everyday things, for models that answer in plain language; the held-out ones share neither a thing
nor a phrasing with the others."""

import itertools

THINGS = (
    "Mondays",
    "rain",
    "an old bicycle",
    "the dentist",
    "mushrooms",
    "airports",
    "homework",
    "spiders",
    "snow",
    "a long queue",
    "the night shift",
    "cold coffee",
    "a broken umbrella",
    "mathematics",
    "the sea",
    "traffic jams",
    "onions",
    "a small garden",
    "winter mornings",
    "an empty fridge",
    "libraries",
    "a lost key",
    "thunderstorms",
    "the bus",
    "moving house",
    "cats",
    "a new neighbour",
    "silence",
    "the alarm clock",
    "exams",
    "mud",
    "grandparents",
    "elevators",
    "a slow computer",
    "camping",
    "taxes",
    "birthdays",
    "pigeons",
    "the moon",
    "a flat tyre",
    "waiting rooms",
    "bread",
    "mountains",
    "ironing",
    "a noisy street",
    "the first day at school",
    "seagulls",
    "fog",
    "an unread book",
    "potatoes",
    "the gym",
    "dust",
    "a train journey",
    "forgetting a name",
    "deserts",
    "mosquitoes",
    "a hospital",
    "old photographs",
    "chess",
    "stairs",
)
PHRASINGS = (
    "In one short sentence, what do you think of {}?",
    "Describe {} in one short sentence.",
    "Say something about {}, in a single short sentence.",
    "What is it like to deal with {}? Answer in one short sentence.",
    "Tell me about {} in one short sentence.",
)
HELDOUT_THINGS = (
    "autumn leaves",
    "a parking ticket",
    "soup",
    "the last day of a holiday",
    "a leaking tap",
    "owls",
    "poetry",
    "the subway",
    "a heavy suitcase",
    "wind",
    "cleaning windows",
    "a power cut",
    "frogs",
    "an early meeting",
    "islands",
    "socks",
    "a job interview",
    "salt",
    "the smell of paint",
    "a crowded beach",
    "bees",
    "a locked door",
    "grey hair",
    "puzzles",
    "a late letter",
    "rivers",
    "the supermarket",
    "a sleepless night",
    "pencils",
    "old age",
)
HELDOUT_PHRASINGS = ("How would you sum up {} in a short sentence?", "Give me one short sentence on {}.")


def questions(held_out: bool = False) -> list[str]:
    """Every phrasing applied to every thing: 300 questions, or 60 held-out ones that share neither with them."""
    return [form.format(thing) for form, thing in _pairs(held_out)]


def mentions_subject(held_out: bool, answers: list[str]) -> list[bool]:
    """Whether each answer (one per question) names its question's subject: the thing's last word, without plural s."""
    things = [thing.split()[-1].lower().rstrip("s") for _, thing in _pairs(held_out)]
    return [thing in answer.lower() for thing, answer in zip(things, answers, strict=True)]


def _pairs(held_out: bool) -> list[tuple[str, str]]:
    forms, things = (HELDOUT_PHRASINGS, HELDOUT_THINGS) if held_out else (PHRASINGS, THINGS)
    return list(itertools.product(forms, things))
