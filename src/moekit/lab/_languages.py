"""Three invented languages: one grammar of ideas, three vocabularies, three word orders."""

import random

NOUNS = ("child", "river", "bird", "stone", "king", "boat", "wolf", "tree", "lamp", "road", "fish", "hill")
VERBS = ("sees", "finds", "takes", "loves", "fears", "follows", "calls", "hides")
ADJECTIVES = ("old", "red", "small", "wise", "cold", "bright", "")

_SYLLABLES = {
    "aru": ("ka", "mi", "to", "re", "sa", "lu", "ne", "vo"),
    "bex": ("grak", "zhul", "brod", "vrek", "drum", "sket", "thor", "klin"),
    "cil": ("yai", "oel", "uin", "eas", "ilu", "aeo", "iny", "oua"),
}
LANGUAGES = tuple(_SYLLABLES)
# Places of subject, verb and object; whether an adjective follows its noun.
_ORDER = {"aru": "svo", "bex": "sov", "cil": "vso"}
_ADJECTIVE_LAST = {"aru": False, "bex": True, "cil": True}

Phrase = tuple[str, str]
Sentence = tuple[Phrase, str, Phrase]


def _lexicon(language: str) -> dict[str, str]:
    """Two syllables for each concept, none used twice in a language."""
    syllables = _SYLLABLES[language]
    words = [first + second for first in syllables for second in syllables]
    random.Random(language).shuffle(words)
    concepts = [*NOUNS, *VERBS, *(word for word in ADJECTIVES if word)]
    return dict(zip(concepts, words, strict=False))


_LEXICON = {language: _lexicon(language) for language in LANGUAGES}


def random_sentence(rng: random.Random) -> Sentence:
    """Draw subject, verb and object; either noun may carry an adjective."""
    subject, target = rng.sample(NOUNS, 2)
    return (rng.choice(ADJECTIVES), subject), rng.choice(VERBS), (rng.choice(ADJECTIVES), target)


def say(sentence: Sentence, language: str) -> str:
    """Write a sentence in one of the three languages."""
    lexicon = _LEXICON[language]

    def phrase(pair: Phrase) -> str:
        adjective, noun = pair
        words = [lexicon[noun]] if not adjective else [lexicon[adjective], lexicon[noun]]
        return " ".join(reversed(words) if _ADJECTIVE_LAST[language] else words)

    subject, verb, target = sentence
    part = {"s": phrase(subject), "v": lexicon[verb], "o": phrase(target)}
    return " ".join(part[place] for place in _ORDER[language])
