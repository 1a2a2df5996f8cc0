"""Short sentences with a clear feeling, to teach the sentiment model more than whole stories."""

import random

from stories import BOYS, GIRLS, NEGATIVE, POSITIVE, expand

MOODS = (
    ("sad", "unhappy", "lonely", "angry", "afraid", "scared", "upset", "hurt", "worried",
     "sick", "disappointed", "miserable", "terrified", "ashamed", "alone", "hopeless", "mad",
     "jealous"),
    ("happy", "glad", "proud", "cheerful", "thankful", "excited", "safe", "joyful", "lucky",
     "delighted", "brave", "pleased", "full of joy", "in love", "fine", "well", "grateful"),
)  # fmt: skip
DEEDS = (
    ("cried", "wept", "screamed", "sighed", "lost {own} [toy|friend|way|money|game]",
     "broke {own} [toy|leg|arm]", "fell down", "had a [terrible|bad|sad] [day|dream|time]",
     "began to cry", "ran away in fear", "lost everything", "got hurt",
     "missed {own} [mother|home]", "could not sleep", "could not stop crying", "failed",
     "made a terrible mistake"),
    ("smiled", "laughed", "danced", "cheered", "sang a happy song", "won the [game|race|prize]",
     "found {own} [toy|friend|money|way home]", "hugged {own} [mother|friend|dog]",
     "had a [great|wonderful|good|lovely] [day|dream|time]", "made a new friend", "jumped for joy",
     "got a [nice|wonderful] present", "had lots of fun", "slept well", "saved the day"),
)  # fmt: skip
QUALITIES = (
    ("bad", "terrible", "awful", "horrible", "sad", "boring", "ugly", "scary", "ruined", "broken",
     "dreadful", "cruel", "nasty", "worthless", "stupid", "mean", "disgusting", "painful", "poor"),
    ("good", "great", "wonderful", "beautiful", "lovely", "nice", "funny", "amazing", "fantastic",
     "excellent", "perfect", "delicious", "sweet", "magical", "brilliant", "kind", "fun", "happy"),
)  # fmt: skip
TASTES = (
    ("hate", "dislike", "do not like", "cannot stand", "am tired of", "do not enjoy"),
    ("love", "like", "enjoy", "adore", "really like", "am so glad about"),
)
OUTCRIES = (
    ("Oh no", "This is the worst [day|thing] ever", "Leave me alone", "Go away", "It hurts",
     "Everything went wrong", "Nobody [loves|likes] me", "What a [shame|disaster|pity]",
     "The dog died", "It was a waste of time", "Nothing works", "I want to cry"),
    ("Hooray", "This is the best [day|thing] ever", "Thank you so much", "Well done", "We did it",
     "Everything went well", "Everyone [loves|likes] me", "What a [joy|surprise|treat]",
     "They lived happily ever after", "It was worth it", "Everything works", "I want to dance"),
)  # fmt: skip
NOUNS = ("day|movie|film|book|story|song|game|party|food|cake|place|idea|trip|school|house|toy|"
         "music|weather|friend|dog|show|thing")  # fmt: skip
# Each subject: its name, "be" now, "be" then, and what belongs to it.
SUBJECTS = (
    ("I", "am", "was", "my"), ("He", "is", "was", "his"), ("She", "is", "was", "her"),
    ("We", "are", "were", "our"), ("They", "are", "were", "their"),
    ("You", "are", "were", "your"), ("The [boy|dog|bear|king|man|cat]", "is", "was", "his"),
    ("The [girl|woman|queen|rabbit|fox]", "is", "was", "her"),
    ("The children", "are", "were", "their"), (f"[{'|'.join(BOYS)}]", "is", "was", "his"),
    (f"[{'|'.join(GIRLS)}]", "is", "was", "her"),
)  # fmt: skip
PATTERNS = (
    "{Who} {be} [very|so|really||] {mood}[.|!]",
    "{Who} {was} [very|so|really||] {mood} and {deed}[.|!]",
    "{Who} felt [very|so||] {mood}[.|!]",
    "{Who} {deed}[.|!| today.| yesterday.]",
    "{Who} {deed} and {deed_2}.",
    "{Who} {be} not {other_mood}[.| at all.| today.]",
    "{Who} {was} not {other_mood} any more.",
    "{Who} {was} {other_mood}, but [now|then|in the end] {who} {was} {mood}.",
    "First {who} {was} {other_mood}, but then {who} {deed}.",
    "I [really|] {taste} [this|the|my|that] [{nouns}][.|!]",
    "[This|The|That|My] [{nouns}] [is|was] [very|so|really||] {quality}[.|!]",
    "[This|The|That|My] [{nouns}] [is|was] not {other_quality}[.| at all.]",
    "[It|This|That] [is|was] [very|so|really||] {quality}[.|!]",
    "What a {quality} [{nouns}]!",
    "It is a {quality} [{nouns}].",
    "{outcry}[.|!]",
    "{mood}",
    "{quality}",
)


def say_feeling(rng: random.Random) -> tuple[str, int]:
    """One short sentence and its tone; now and then without capitals or a full stop."""
    tone = rng.choice((NEGATIVE, POSITIVE))
    other = NEGATIVE if tone == POSITIVE else POSITIVE
    subject, now, then, own = rng.choice(SUBJECTS)
    who = expand(rng, subject, {})
    slots = {
        "Who": who, "who": who if who == "I" else who[0].lower() + who[1:], "own": own,
        "be": rng.choice((now, then)), "was": then, "nouns": NOUNS,
        "mood": rng.choice(MOODS[tone]), "other_mood": rng.choice(MOODS[other]),
        "quality": rng.choice(QUALITIES[tone]), "other_quality": rng.choice(QUALITIES[other]),
        "taste": rng.choice(TASTES[tone]), "outcry": rng.choice(OUTCRIES[tone]),
    }  # fmt: skip
    slots["deed"], slots["deed_2"] = (deed.format(own=own) for deed in rng.sample(DEEDS[tone], 2))
    text = expand(rng, rng.choice(PATTERNS), slots)
    return (text.lower().rstrip(".!") if rng.random() < 0.15 else text), tone
