"""A small story grammar: endless little stories, each with a tone that follows from its ending.

A template is plain text with two kinds of holes. ``[sad|tired|]`` picks one of its alternatives
(the empty one too), and ``{hero}`` takes a value that stays the same through the whole story,
which keeps names, pronouns and things consistent.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

NEGATIVE, POSITIVE = 0, 1
TONES = ("negative", "positive")

Templates = tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """A told story; every sentence of ``ending`` shows the tone on its own."""

    tone: int
    opening: Templates
    ending: Templates

    @property
    def text(self) -> str:
        """The whole story as one paragraph."""
        return " ".join(self.opening + self.ending)


@dataclass(frozen=True)
class Plot:
    """What a story is about: the same wish and trouble can be won or lost in the end."""

    places: Templates
    things: Templates
    wish: Templates
    trouble: Templates
    help: Templates
    won: Templates
    lost: Templates


BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Tim", "Finn", "Oscar", "Noah", "Pip", "Hugo")
GIRLS = ("Lily", "Mia", "Anna", "Sara", "Ella", "Lucy", "Rosie", "Emma", "Zoe", "Nina", "Daisy",
         "Ruby")  # fmt: skip
ANIMALS = ("fox", "rabbit", "bear", "mouse", "duck", "frog", "cat", "puppy", "squirrel", "owl",
           "turtle", "pony", "hedgehog", "lamb")  # fmt: skip
COLORS = ("red", "blue", "green", "yellow", "white", "golden", "purple", "orange", "silver")
HOMES = ("in a [small|cozy|little] [house|cottage] near the [forest|river|sea|hills]",
         "in a [quiet|small|busy] [village|town] by the [river|sea|lake|woods]",
         "on a [big|little|sunny] farm", "at the edge of a [dark|deep|green] forest",
         "under an old [oak|apple] tree", "high up in the mountains")  # fmt: skip

OPENINGS = (
    "Once upon a time, there was {a_hero} named {hero}. {He} lived {home}.",
    "Once upon a time, {a_hero} named {hero} lived {home}.",
    "Once there was {a_hero}. {His} name was {hero}, and {he} lived {home}.",
    "Long ago, {a_hero} named {hero} lived {home} with {his} [mother|father|family|grandmother].",
    "{hero} was {a_hero} who lived {home}.",
    "There was once {a_hero} called {hero}, who lived {home}.",
)
TRAITS = (
    "{He} was [very|always|] [kind|brave|curious|shy|quiet|clever|gentle] and [friendly|funny|"
    "cheerful|honest|strong].",
    "{He} loved to [sing|run|play|read|draw|dance] [in the sun|all day long|every morning|by the "
    "fire].",
    "Everyone knew {hero} because {he} had a {color} [scarf|hat|coat|bag].",
    "{He} was small, but {he} had a big heart.",
    "Every [morning|evening], {he} [looked out of the window|watched the clouds|listened to the "
    "birds] and dreamed.",
)
DAYS = (
    "One [sunny|cold|windy|rainy|warm|bright] [day|morning|afternoon], {hero} went to {place}.",
    "One day, {hero} [walked|ran|went] to {place}.",
    "On a [sunny|cold|windy|warm] [morning|day], {he} came to {place}.",
    "One [spring|summer|autumn|winter] day, {hero} walked [slowly|quickly|happily] to {place}.",
)
WORRIES = (
    "{hero} [felt|was] [sad|worried|upset|afraid] and did not know what to do.",
    "{hero} [sat down|stopped] and [sighed|thought for a long time|shook {his} head].",
    '"Oh no!" [cried|said|shouted] {hero}. "What [can|should|will] I do [now|]?"',
    '"This is [too hard|not good|a big problem]," {he} said [quietly|softly|in a small voice].',
    "{He} tried [again and again|once more|three times], but it did not work.",
)
MEETINGS = (
    "Just then, {a_friend} named {friend} came by.",
    "Soon {he} met {a_friend} named {friend}.",
    "{A_friend} named {friend} heard {him} and came [near|closer|to see].",
    "Then {he} saw {friend}, {a_friend} who lived nearby.",
)
QUESTIONS = (
    '"What is wrong[, {hero}|]?" asked {friend}. {hero} told {f_him} [everything|the whole story].',
    '"Why do you look so [sad|worried|lost]?" {friend} asked. {hero} told {f_him} what had '
    "happened.",
    '"Can you help me[, please|]?" asked {hero}.',
    '"Hello, {hero}," said {friend}. "[Do you need help|Are you all right|What happened]?" {hero} '
    "told {f_him} about the problem.",
)
PROMISES = (
    '"[Do not worry|Do not be afraid|Do not give up]," said {friend}. "[I will help you|We can '
    'try together|I have an idea|Two friends are better than one]."',
    '"[Of course|Yes]," said {friend}. "[Let us try|Come with me|Friends help each other]."',
    '{friend} [thought for a moment|smiled|nodded] and said, "[I know what to do|Let us do it '
    'together|I will stay with you]."',
)
REFUSALS = (
    '"No," said {friend}. "[I am too busy|I do not want to help you|That is not my problem|Go '
    'away]." {F} [walked|turned] away and did not look back.',
    "{friend} only [laughed at {him}|shook {f_his} head] and [went home|walked away]. {hero} was "
    "all alone.",
    "{friend} [promised|said {f} wanted] to help, but {f} [never came back|ran away|forgot "
    "about it].",
)
JOYS = (
    "{hero} was so [happy|glad|proud] that {he} [jumped up and down|danced|laughed out loud|sang "
    "a song].",
    "{hero} [smiled|laughed] and [hugged|thanked] {friend}.",
    '"Thank you, {friend}!" said {hero} with a big smile. "You are a [true|good|wonderful|great] '
    'friend."',
    '"We did it!" they [cheered|shouted|sang] [together|happily].',
    "{hero} felt [warm|happy|proud|safe] inside, and {friend} was [happy|glad|proud] too.",
    "Then they had [a great time|lots of fun|cake and warm milk] together.",
)
HAPPY_ENDS = (
    "From that day on, {hero} and {friend} were best friends.",
    "They [played|laughed|danced] together until the sun went down.",
    "{hero} went home with a [smile|happy heart|big smile] and slept well.",
    "And they lived happily ever after.",
    "It was the best day [ever|of {his} life].",
    "{hero} learned that [a good friend makes everything better|asking for help is brave|kindness "
    "always comes back].",
)
SORROWS = (
    "{hero} sat down and [cried|wept] [for a long time|all alone|until it was dark].",
    "{hero} was [so|very] [sad|unhappy|lonely|disappointed] that {he} [could not speak|began to "
    "cry|hid {his} face].",
    "[Big|Hot|Bitter] tears ran down {his} face.",
    '"It is all my fault," {he} [said|cried|whispered] [sadly|with tears in {his} eyes].',
    "{His} heart was [heavy|broken|full of pain].",
    "{hero} felt [awful|terrible|hopeless] and [wanted to be alone|could not stop crying].",
)
SAD_ENDS = (
    "{He} walked home [alone|in the cold rain|in the dark] and did not [eat|sleep|say a word].",
    "It was the [worst|saddest] day of {his} life.",
    "That night, {hero} cried [in bed|in the dark|into {his} pillow].",
    "{hero} never [smiled|played|sang] [there|like that] again.",
    "After that, {hero} was [sad|lonely|unhappy] for a [very|] long time.",
    "{hero} learned that [some things are lost forever|not every wish comes true|a careless "
    "moment can hurt a lot], and it made {him} sad.",
)

PLOTS = (
    Plot(
        places=("the park", "the beach", "the meadow", "the old garden"),
        things=("ball", "kite", "hat", "teddy bear", "drum", "whistle"),
        wish=("{He} had {his} {color} {thing} with {him} and wanted to play with it all day.",
              "{He} took {his} favorite {color} {thing} along, because {he} loved it very much."),
        trouble=("But when {he} looked around, the {thing} was gone!",
                 "A strong wind came, and suddenly the {color} {thing} was gone."),
        help=("They looked [behind the trees|under the bushes|near the big stones] and [in the "
              "tall grass|next to the pond|along the path].",
              "{friend} and {hero} searched [everywhere|all afternoon] for the {thing}."),
        won=("At last, {hero} saw something {color}. It was the {thing}!",
             '"Look!" called {friend}. The {thing} was [in a tree|under a leaf|in a hole], and it '
             "was as good as new."),
        lost=("They never found the {color} {thing}, and {hero} missed it badly.",
              "At last {hero} saw the {thing}, but it was [broken|torn and ruined].",
              "The {thing} was lost forever."),
    ),
    Plot(
        places=("the lake", "the river", "the pond"),
        things=("boat", "raft", "little ship"),
        wish=("{He} wanted to build a {color} {thing} and sail to the other side.",
              '"I want to sail across the water in a {thing}," {he} said.'),
        trouble=("But the {thing} had a hole, and water came in.",
                 "But the wood was too heavy, and the {thing} fell apart."),
        help=("They [tied the wood with a rope|closed the hole with leaves|used new wood] and "
              "pushed the {thing} into the water.",
              "{friend} brought [a hammer|a long rope|strong wood], and they worked until noon."),
        won=("The {thing} did not sink! It sailed across the water like a [bird|swan].",
             "Soon they reached the other side, and the sun was [warm|shining] on the water."),
        lost=("But the {thing} broke in two and sank, and all the work was ruined.",
              "A big wave came and took the {thing} away forever."),
    ),
    Plot(
        places=("the kitchen", "the bakery", "{his} grandmother's house"),
        things=("cake", "pie", "bread", "soup"),
        wish=("{He} wanted to make a [big|sweet|special] {thing} for {his} [mother|father|"
              "grandmother|teacher].",
              "It was a birthday, so {hero} wanted to make the best {thing} in the world."),
        trouble=("But there was no [sugar|salt|butter|flour] left in the house.",
                 "But {he} dropped the bowl, and everything fell on the floor."),
        help=("{friend} brought [some flour|fresh milk|a basket of apples|butter and honey], and "
              "they started again.",
              "They mixed and stirred, and the {thing} went over the fire."),
        won=("The {thing} smelled wonderful and tasted even better.",
             "When the {thing} was ready, everybody ate and asked for more. It was delicious!"),
        lost=("But they forgot the fire, and the {thing} was burned and black.",
              "The {thing} tasted terrible, and nobody wanted to eat it."),
    ),
    Plot(
        places=("the forest", "the dark woods", "the hills"),
        things=("berries", "mushrooms", "flowers", "nuts"),
        wish=("{He} wanted to pick [sweet|pretty|many] {thing} for {his} family.",
              '"I will bring home a basket full of {thing}," {he} said.'),
        trouble=("{He} walked too far and could not find the way home.",
                 "Soon it grew dark, and every tree looked the same. {hero} was lost."),
        help=("They followed [the stars|the stream|a narrow path|a small light] between the trees.",
              "{friend} knew the forest and [held {his} hand|walked in front with a lamp]."),
        won=("Soon they saw a light in a window. {hero} was safe at home!",
             "{His} mother ran out and hugged {him}. Everyone was glad."),
        lost=("But the path ended, and {hero} had to stay in the cold, dark forest, scared and "
              "hungry.",
              "The night was cold, and no one came. {hero} was afraid and hurt."),
    ),
    Plot(
        places=("the school", "the old barn", "the town square"),
        things=("song", "dance", "poem", "play"),
        wish=("There was a big show, and {hero} wanted to show {his} new {thing}.",
              "{He} had worked on a {thing} and wanted everyone to see it."),
        trouble=("But when {he} saw all the people, {he} was too afraid to begin.",
                 "But {he} forgot how the {thing} began, and {his} legs shook."),
        help=("{friend} [stood next to {him}|held {his} hand] and counted, one, two, three.",
              "They [went behind the curtain|found a quiet corner] and tried the {thing} once "
              "more."),
        won=("Then {hero} began, and the {thing} was beautiful. Everybody clapped.",
             "{hero} did not make one mistake, and {he} won the [first prize|golden cup]!"),
        lost=("But {hero} made a mistake, and the people laughed at {him}. {He} was ashamed.",
              "{hero} ran away in fear, and the show went on without {him}."),
    ),
    Plot(
        places=("the tall tree", "the old tower", "the steep hill"),
        things=("kitten", "bird", "baby owl", "little squirrel"),
        wish=("{He} heard a {thing} that was stuck high up, and {he} wanted to save it.",
              "High up sat a {color} {thing} that could not come down. {hero} wanted to help it."),
        trouble=("But it was too high, and {he} could not climb so far.",
                 "The wind blew hard, and {hero} was afraid to fall."),
        help=("{friend} brought a [ladder|rope|big blanket], and {hero} climbed up step by step.",
              "{hero} stood on {friend}'s back and reached out for the {thing}."),
        won=("At last {he} held the {thing} in {his} arms. It was safe!",
             "The {thing} jumped down into {his} arms and was safe and happy."),
        lost=("But the {thing} fell and was badly hurt.",
              "{hero} slipped and fell, and {his} leg hurt very much."),
    ),
    Plot(
        places=("the garden", "the field", "the yard"),
        things=("tree", "rose", "pumpkin", "sunflower"),
        wish=("{He} planted a tiny seed and wanted it to become a [big|beautiful] {thing}.",
              "{He} had one seed, and {he} dreamed of a {color} {thing}."),
        trouble=("But it did not rain for many days, and the ground was hard and dry.",
                 "But [bugs|birds|snails] came and ate the little leaves."),
        help=("Every day they [carried water from the well|watered the little plant|pulled out the "
              "weeds].",
              "They built a [fence|small roof] around the plant and waited."),
        won=("Slowly it grew and grew, and it became the most beautiful {thing} in the village.",
             "One morning, the {thing} was there, big and {color} and lovely!"),
        lost=("But the little plant turned brown and died.",
              "Then a bad storm came and destroyed the {thing}."),
    ),
    Plot(
        places=("the big race", "the snowy hill", "the green field"),
        things=("medal", "golden cup", "ribbon", "prize"),
        wish=("There was a race, and {hero} wanted to win the {thing}.",
              '"I will run faster than the wind and win the {thing}," said {hero}.'),
        trouble=("But {he} was slow, and the others were already far away.",
                 "But {he} tripped over a [stone|root] and fell into the mud."),
        help=("{friend} [cheered for {him}|gave {him} water|cleaned {his} knee], and {hero} got up "
              "and ran again.",
              "They ran side by side, [past the mill|over the bridge|around the lake]."),
        won=("{hero} ran faster and faster and won the {thing}!",
             "{hero} crossed the line first, and everybody cheered."),
        lost=("But {hero} came in last, and the others laughed at {him}.",
              "{hero} hurt {his} foot, lost the race and did not get the {thing}."),
    ),
    Plot(
        places=("the pond", "the hill", "the long road"),
        things=("swim", "fly a kite", "ride a bike", "skate", "climb"),
        wish=("{He} wanted to learn how to {thing}, just like the others.",
              "More than anything, {hero} wanted to {thing}."),
        trouble=("But {he} was afraid, and {his} first try went wrong.",
                 "But it was hard to {thing}, and {he} fell down."),
        help=("{friend} showed {him} how to do it, [slowly|step by step|many times].",
              "They practiced [every day|all morning|until noon], and {friend} never let go."),
        won=("And then it worked! {hero} could {thing}, all by {himself}!",
             "At the end of the day, {hero} could {thing} better than anyone."),
        lost=("But {hero} got hurt and never tried to {thing} again.",
              "But {hero} could not learn it, and the others made fun of {him}."),
    ),
    Plot(
        places=("the toy shop", "the market", "the fair"),
        things=("robot", "doll", "train", "music box", "puppet"),
        wish=("There {he} saw a {color} {thing}, and {he} wanted it so much.",
              "In the window stood a {color} {thing}. {hero} had never seen anything so pretty."),
        trouble=("But {he} had only [one coin|two coins] in {his} pocket.",
                 "{He} touched it, and the {thing} fell down and stopped working."),
        help=("They [worked for the old man|swept the floor|carried boxes] all day to pay for the "
              "{thing}.",
              "{friend} took [a tiny key|some glue|a box of tools] and looked at the {thing}."),
        won=("The old man smiled and gave {hero} the {thing} as a gift!",
             "In the evening, {hero} carried the {color} {thing} home with joy."),
        lost=("But someone else bought the {thing}, and {hero} went away with nothing.",
              "The {thing} was broken, and the old man was very angry."),
    ),
    Plot(
        places=("the playground", "the new school", "the village"),
        things=("friend", "playmate"),
        wish=("{He} was new there and wanted to find a {thing}.",
              '"I wish I had a {thing}," {he} said to {himself}.'),
        trouble=("But the others played without {him}, and nobody said hello.",
                 "But {he} was too shy to talk to anyone."),
        help=("{friend} asked {him} to [share a sandwich|build a sand castle|play a game].",
              "They sat [on the grass|on a bench|under a tree] and talked about [stars|books|"
              "pirates|dragons]."),
        won=("Soon they laughed like old friends, and {hero} was not lonely any more.",
             "The others came to play too, and {hero} had many new friends."),
        lost=("But {friend} soon left with the others, and {hero} was alone again.",
              "Then they had a fight, and {friend} said mean words. {hero} had no friend."),
    ),
    Plot(
        places=("the cave", "the old castle", "the island"),
        things=("treasure", "golden ring", "magic lamp", "crown"),
        wish=("{He} had an old map and wanted to find the {thing}.",
              "{His} grandfather had told {him} about a {thing} that was hidden there."),
        trouble=("But a big stone was in the way, and {he} could not move it.",
                 "But a [dragon|giant] sat in front of the door and would not let {him} in."),
        help=("They [pushed with all their might|dug a hole|asked politely|sang a soft song] and "
              "took a step inside.",
              "{friend} [lit a candle|found a secret door|read the map], and they went on."),
        won=("There it was! The {thing} was shining in the light, and they shared it.",
             "They found the {thing} and gave it to the village. Everyone was thankful."),
        lost=("But somebody had stolen the {thing}, and the room was empty.",
              "The stones fell down, and {hero} was trapped and hurt in the dark."),
    ),
    Plot(
        places=("{his} room", "the attic", "{his} little bed"),
        things=("noise", "shadow", "voice"),
        wish=("It was late, and {hero} only wanted to sleep.",
              "{He} was tired and wanted to have a sweet dream."),
        trouble=("But there was a strange {thing} [behind the door|under the bed|at the window].",
                 "Then {he} noticed a {thing} in the dark, and {he} was scared."),
        help=("They took a lamp and went to look for the {thing} together.",
              "Very slowly, they [opened the door|looked under the bed|pulled the curtain]."),
        won=("It was only a [tiny mouse|kitten|leaf in the wind]! They laughed, and {hero} was "
             "not afraid any more.",
             "There was nothing bad at all, and {hero} felt safe and brave."),
        lost=("But the lamp went out, and {hero} screamed in fear.",
              "The {thing} grew bigger and bigger, and {hero} was terrified all night."),
    ),
    Plot(
        places=("the bridge", "the valley", "the snowy mountains"),
        things=("letter", "medicine", "present", "basket of food"),
        wish=("{He} had to bring a {thing} to {his} sick [aunt|uncle|grandmother].",
              "{His} grandmother was ill, and {hero} wanted to bring her a {thing}."),
        trouble=("But the bridge was broken, and the river was wild and deep.",
                 "But [snow|rain] began to fall, and {he} could not see the road."),
        help=("They [walked around the hill|crossed on a big log|went from stone to stone] and "
              "kept the {thing} dry.",
              "{friend} carried the {thing} and [showed {him} another way|sang to keep {him} "
              "awake]."),
        won=("They arrived in time with the {thing}, and soon everyone was well again.",
             '"You are so [brave|kind]!" said the family, and they all had hot tea together.'),
        lost=("But the {thing} fell into the water and was gone.",
              "They came too late, and there was nothing left to do but cry."),
    ),
)  # fmt: skip

PRONOUNS = {True: ("he", "him", "his", "himself"), False: ("she", "her", "her", "herself")}


def expand(rng: random.Random, template: str, slots: Mapping[str, str]) -> str:
    """Fill the ``{holes}``, pick from the ``[alternatives]`` and tidy spaces and a/an."""
    text = template.format_map(slots)
    text = re.sub(r"\[([^\]]*)\]", lambda match: rng.choice(match[1].split("|")), text)
    text = re.sub(r" +(?=[ .,!?])", "", text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def character(rng: random.Random, is_boy: bool, plain: str) -> str:
    """A noun phrase such as "a small fox" that introduces the character."""
    size = rng.choice(("little", "small", "young", plain))
    kind = rng.choice(ANIMALS) if rng.random() < 0.6 else "boy" if is_boy else "girl"
    return f"a {size} {kind}"


def cast(rng: random.Random, plot: Plot) -> dict[str, str]:
    """The values of one story: who it is about, who helps, where it is and what is wanted."""
    hero_is_boy, friend_is_boy = rng.random() < 0.5, rng.random() < 0.5
    hero = rng.choice(BOYS if hero_is_boy else GIRLS)
    friend = rng.choice([n for n in (BOYS if friend_is_boy else GIRLS) if n != hero])
    he, him, his, himself = PRONOUNS[hero_is_boy]
    f, f_him, f_his, _ = PRONOUNS[friend_is_boy]
    a_friend = character(rng, friend_is_boy, "kind")
    slots = {
        "hero": hero, "he": he, "him": him, "his": his, "himself": himself,
        "He": he.capitalize(), "His": his.capitalize(),
        "friend": friend, "f": f, "f_him": f_him, "f_his": f_his, "F": f.capitalize(),
        "a_hero": character(rng, hero_is_boy, "happy"),
        "a_friend": a_friend, "A_friend": a_friend.capitalize(),
        "color": rng.choice(COLORS), "thing": rng.choice(plot.things),
    }  # fmt: skip
    slots["home"] = expand(rng, rng.choice(HOMES), slots)
    slots["place"] = expand(rng, rng.choice(plot.places), slots)
    return slots


def tell_story(rng: random.Random) -> Story:
    """Tell one new story, sad or happy with equal chance."""
    plot, tone = rng.choice(PLOTS), rng.choice((NEGATIVE, POSITIVE))
    slots = cast(rng, plot)
    refused = tone == NEGATIVE and rng.random() < 0.3
    opening = [OPENINGS, DAYS, plot.wish, plot.trouble, MEETINGS, QUESTIONS]
    opening += [REFUSALS] if refused else [PROMISES, plot.help]
    if rng.random() < 0.7:
        opening.insert(1, TRAITS)
    if rng.random() < 0.7:
        opening.insert(opening.index(MEETINGS), WORRIES)
    feelings, ends = (JOYS, HAPPY_ENDS) if tone == POSITIVE else (SORROWS, SAD_ENDS)
    ending = [plot.won if tone == POSITIVE else plot.lost, feelings, ends]

    def tell(parts: list[Templates]) -> Templates:
        return tuple(expand(rng, rng.choice(part), slots) for part in parts)

    return Story(tone, tell(opening), tell(ending))


def retell(rng: random.Random, story: Story) -> str:
    """A random part of the story, in order, that still shows its tone."""
    share = rng.random()
    before = [sentence for sentence in story.opening if rng.random() < share]
    kept = sorted(rng.sample(range(len(story.ending)), rng.randint(1, len(story.ending))))
    return " ".join(before + [story.ending[index] for index in kept])
