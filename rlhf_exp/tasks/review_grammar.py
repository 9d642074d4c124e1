"""The grammar of the generated film reviews, and a random walk through it.

Knows English and sentiment, not splits, seeds, files or tokens.
"""

import random
import re

Rules = dict[str, tuple[tuple[str, ...], ...]]

MIN_TOKENS, MAX_TOKENS = 26, 40
_MIN_TOKENS_BEFORE_CLOSING = 20
# Every word of the grammar that begins with one of these letters begins with a vowel sound.
_ARTICLE_BEFORE_VOWEL = re.compile(r"\ba(?= [aeiou])")


def _words(text: str) -> tuple[tuple[str, ...], ...]:
    """One alternative a word."""
    return tuple((word,) for word in text.split())


def _phrases(text: str) -> tuple[tuple[str, ...], ...]:
    """One alternative a line; upper-case words are symbols, and a repeated line counts double."""
    return tuple(tuple(line.split()) for line in text.strip().splitlines())


_SHARED: Rules = {
    "OPENING": _phrases("""
        PREFIXED
        FREE
        FREE
        FREE
    """),
    "PREFIXED": _phrases("this movie was really PRED TAIL"),
    "FREE": _phrases("""
        this WORK IS PRED TAIL
        this WORK IS PRED TAIL
        this WORK IS ADJP TAIL
        the WORK IS PRED TAIL
        the WORK IS ADJP TAIL
        this GENRE IS ADJP TAIL
        i thought this WORK was PRED TAIL
        i thought the PART was ADJP , and CLAUSE .
        i found this WORK ADJP TAIL
        i saw this WORK TIME , and it was PRED .
        i watched this WORK TIME , and CLAUSE .
        VIEWER took me to see this WORK , and it was PRED .
        VIEWER told me that it was PRED TAIL
        the first thing to say is that CLAUSE .
        as a fan of this director , i found it ADJP TAIL
        in my opinion , this WORK IS ADJP TAIL
        right from the start , this WORK IS ADJP .
        for a GENRE , it is ADJP TAIL
        CLAUSE , and CLAUSE .
    """),
    "WORK": _phrases("""
        movie
        movie
        film
        film
        picture
    """),
    "WORKS": _words("movies films pictures"),
    "IS": _words("is was"),
    "BE": _words("was is felt seemed"),
    "ARE": _words("were are felt seemed"),
    "GENRE": _words("comedy drama thriller western romance mystery musical"),
    # Singular parts of a film; THING holds those that may follow "a".
    "PART": _phrases("""
        THING
        THING
        MASS
    """),
    "THING": _words("plot story script soundtrack score ending premise finale tone mood"),
    "MASS": _words("acting dialogue pacing music editing photography direction humour lighting"),
    "PARTS": _words(
        "actors characters jokes songs costumes effects performances visuals twists sets "
        "colours stunts leads"
    ),
    "EACH": _phrases("""
        every scene
        every line
        every joke
        each song
        each performance
    """),
    "ACTOR": _phrases("""
        LEAD
        LEAD
        supporting cast
        hero
        villain
    """),
    "LEAD": _phrases("""
        lead actor
        lead actress
        young star
    """),
    "TELLER": _words("director writer film movie script picture"),
    "MOMENT": _phrases("""
        the ORDINAL HALF
        the KIND scene
        the KIND scene
    """),
    "ORDINAL": _words("first second last"),
    "HALF": _words("half hour act scene"),
    "KIND": _words("wedding train dance court kitchen chase dream opening"),
    "SPAN": _phrases("""
        from start to finish
        from beginning to end
        all the way through
        throughout
    """),
    "TIME": _phrases("""
        last night
        at home
        on a plane
        in a full cinema
        with VIEWER
    """),
    "VIEWER": _phrases("my KIN"),
    "KIN": _words("sister brother friends parents family neighbours partner"),
    "SKILL": _words("skill care wit grace heart flair warmth charm imagination style"),
    "MADE": _words("acted shot written directed paced edited filmed"),
    "ENJOY": _words("enjoy love like admire recommend"),
    "WORTH": _phrases("""
        seeing
        watching
        the ticket
        the wait
    """),
    "FACT": _phrases("""
        one part follows TOPIC who must QUEST
        MOMENT is about TOPIC
        MOMENT takes place PLACE
        the WORK was shot PLACE
        the LEAD plays PERSON
    """),
    "TOPIC": _phrases("""
        PERSON
        two PEOPLE
        three PEOPLE
    """),
    "PERSON": _phrases("a TEMPER JOB"),
    "TEMPER": _words("young old retired lonely quiet"),
    "JOB": _words("teacher painter doctor sailor singer nurse"),
    "PEOPLE": _words("brothers sisters strangers students"),
    "QUEST": _phrases("""
        find a lost letter
        save a farm
        leave home
        sell a boat
        run a hotel
    """),
    "PLACE": _phrases("""
        in a small town
        by the sea
        on a farm
        in a big city
        on an island
        on a boat
        at a hotel
    """),
    "DEG": _words("really quite very truly so genuinely surprisingly remarkably DEG_OWN DEG_OWN"),
    "FULL": _words("simply absolutely truly just"),
    "ADJ": _phrases("""
        GRAD
        GRAD
        ABS
    """),
    "ADJP": _phrases("""
        GRAD
        ABS
        DEG GRAD
        DEG GRAD
        FULL ABS
        GRAD and GRAD
    """),
}

# GRAD: adjectives for the film and all its parts that take an adverb of degree. ABS: those that
# take an adverb of completeness. FELT: adjectives for the film as a whole.
_POSITIVE: Rules = {
    "GRAD": _words(
        "good charming clever fresh bold inventive original lively graceful thoughtful beautiful "
        "elegant stylish memorable impressive lovely warm polished vivid convincing"
    ),
    "ABS": _words(
        "wonderful superb brilliant delightful excellent splendid terrific fantastic marvellous "
        "outstanding great"
    ),
    "FELT": _words(
        "funny moving gripping exciting engaging entertaining satisfying rewarding uplifting "
        "touching enjoyable witty smart sweet"
    ),
    "DEG_OWN": _words("wonderfully refreshingly"),
    "WELL": _words("beautifully perfectly nicely well brilliantly"),
    "MILD": _words("uneven familiar weak flat stiff plain"),
    "JOY": _words("joy delight pleasure treat thrill"),
    "GEM": _words("triumph gem masterpiece success classic"),
    "LOVED": _words("loved enjoyed adored liked admired"),
    "PRED": _phrases("""
        ADJ
        ADJ
        FELT
        FELT
        FELT and GRAD
        GRAD and FELT
        ADJ SPAN
        FELT SPAN
        a JOY to watch
        a ADJ GEM
        WELL MADE
        WELL MADE and FELT
        worth WORTH
        fun to watch
        easy to ENJOY
        full of SKILL and SKILL
    """),
    "TAIL": _phrases("""
        .
        , and CLAUSE .
        , and CLAUSE .
        , with a ADJ THING and ADJ PARTS .
        because the PART was ADJP .
        because the PARTS were ADJP .
        , and VIEWER LOVED it too .
    """),
    "CLAUSE": _phrases("""
        the PART BE ADJP
        the PART BE ADJP
        the PARTS ARE ADJP
        the PARTS ARE ADJP
        the ACTOR was ADJP
        the ACTOR stole every scene
        the PARTS worked WELL
        the PART was WELL handled
        EACH was ADJP
        i LOVED the PARTS
    """),
    "BODY": _phrases("""
        CLAUSE , and CLAUSE .
        CLAUSE , and CLAUSE .
        the PART was ADJP SPAN .
        the ACTOR gave a ADJ performance .
        i LOVED MOMENT , and VIEWER did too .
        the TELLER tells the story with SKILL and SKILL .
        MOMENT made me SMILE .
        there is real SKILL in MOMENT .
        the THING kept me HOOKED SPAN .
        although the PART was a little MILD , the PARTS were ADJP .
        some of the PARTS were MILD , but i did not mind .
        i laughed , i cried , and i never looked at the clock .
        FACT , and CLAUSE .
        it has a ADJ THING , ADJ PARTS and a ADJ THING .
        the PARTS and the PARTS were ADJP .
        VIEWER LOVED it as much as i did .
        it is rare to see such a ADJ WORK .
    """),
    "SMILE": _phrases("""
        smile
        laugh
        cheer
        grin
        cry with joy
        want to dance
    """),
    "HOOKED": _words("hooked smiling guessing laughing entertained"),
    "CLOSING": _phrases("""
        i give it HIGH out of ten .
        i would recommend it to VIEWER .
        i cannot wait to see it again .
        it is one of the best WORKS of the year .
        i left the cinema MERRY .
        it deserves every award .
        go and see it with your KIN .
        overall it is a ADJ GEM .
        VIEWER and i LOVED it .
        do not miss this ADJ WORK .
        i will remember MOMENT for years .
        what a ADJ JOY it was .
        see it for the ADJ PARTS .
    """),
    "HIGH": _words("eight nine ten"),
    "MERRY": _phrases("""
        smiling
        happy
        inspired
        delighted
        full of hope
    """),
}

_NEGATIVE: Rules = {
    "GRAD": _words(
        "bad dull weak lazy flat clumsy bland forgettable disappointing stale cheap awkward poor "
        "dreary shallow messy stiff silly ugly"
    ),
    "ABS": _words(
        "awful terrible dreadful horrible atrocious appalling lifeless pointless hopeless "
        "worthless ridiculous"
    ),
    "FELT": _words(
        "boring tedious predictable tiresome confusing annoying irritating muddled "
        "noisy frustrating depressing painful"
    ),
    "DEG_OWN": _words("painfully terribly hopelessly"),
    "BADLY": _words("badly poorly carelessly clumsily"),
    "MILD": _words("fine decent pleasant lively polished good"),
    "CHORE": _words("chore struggle bore nightmare"),
    "MESS": _words("mess failure disaster mistake letdown"),
    "HATED": _words("hated loathed disliked despised"),
    "PRED": _phrases("""
        ADJ
        ADJ
        FELT
        FELT
        FELT and GRAD
        GRAD and FELT
        ADJ SPAN
        FELT SPAN
        a CHORE to watch
        a ADJ MESS
        BADLY MADE
        BADLY MADE and FELT
        not worth WORTH
        no fun at all
        hard to ENJOY
        short on SKILL and SKILL
    """),
    "TAIL": _phrases("""
        .
        , and CLAUSE .
        , and CLAUSE .
        , with a ADJ THING and ADJ PARTS .
        because the PART was ADJP .
        because the PARTS were ADJP .
        , and VIEWER HATED it too .
    """),
    "CLAUSE": _phrases("""
        the PART BE ADJP
        the PART BE ADJP
        the PARTS ARE ADJP
        the PARTS ARE ADJP
        the ACTOR was ADJP
        the ACTOR ruined every scene
        the PARTS failed completely
        the PART was BADLY handled
        EACH was ADJP
        i HATED the PARTS
    """),
    "BODY": _phrases("""
        CLAUSE , and CLAUSE .
        CLAUSE , and CLAUSE .
        the PART was ADJP SPAN .
        the ACTOR gave a ADJ performance .
        i HATED MOMENT , and VIEWER did too .
        the TELLER tells the story without SKILL or SKILL .
        MOMENT made me YAWN .
        there is no SKILL in MOMENT .
        the THING left me BORED SPAN .
        although the PART was MILD , the PARTS were ADJP .
        some of the PARTS were MILD , but it was not enough .
        i yawned , i sighed , and i kept looking at the clock .
        FACT , but CLAUSE .
        it has a ADJ THING , ADJ PARTS and a ADJ THING .
        the PARTS and the PARTS were ADJP .
        VIEWER HATED it as much as i did .
        it is rare to see such a ADJ WORK .
    """),
    "YAWN": _phrases("""
        yawn
        groan
        sigh
        want to leave
        fall asleep
    """),
    "BORED": _words("bored cold confused annoyed angry"),
    "CLOSING": _phrases("""
        i give it LOW out of ten .
        i would not recommend it to VIEWER .
        i never want to see it again .
        it is one of the worst WORKS of the year .
        i left the cinema GLUM .
        it deserves no award .
        do not take your KIN to see it .
        overall it is a ADJ MESS .
        VIEWER and i HATED it .
        stay away from this ADJ WORK .
        i would like to forget MOMENT .
        what a ADJ CHORE it was .
        i want my money back .
    """),
    "LOW": _words("one two three"),
    "GLUM": _phrases("""
        yawning
        angry
        disappointed
        annoyed
        before the end
        with a headache
    """),
}

_NEUTRAL: Rules = {
    "GRAD": _words(
        "ordinary average typical standard conventional simple plain traditional routine middling "
        "familiar restrained"
    ),
    "ABS": _words("ordinary average typical standard conventional traditional"),
    # Not the shared ones: "so average" and "simply standard" are complaints.
    "DEG": _words("quite fairly somewhat mostly rather really"),
    "FULL": _words("mostly quite"),
    "PRED": _phrases("""
        GRAD
        GRAD
        GRAD and GRAD
        about TOPIC
        about TOPIC who must QUEST
        a GENRE about TOPIC
        a GENRE about TOPIC
        a GRAD GENRE
        set PLACE
        more of a GENRE than a GENRE
        close to the book
        neither good nor bad
        meant for fans of the book
    """),
    "TAIL": _phrases("""
        .
        .
        , and CLAUSE .
        , and CLAUSE .
        , with a GRAD THING and GRAD PARTS .
        , and the WORK runs for LENGTH .
    """),
    "CLAUSE": _phrases("""
        the PART BE ADJP
        the PART BE ADJP
        the PARTS ARE ADJP
        the PARTS ARE ADJP
        the LEAD plays PERSON
        the TEXT follows the book
        the PARTS were as expected
        i noticed the PARTS
    """),
    "BODY": _phrases("""
        CLAUSE , and CLAUSE .
        CLAUSE , and CLAUSE .
        FACT .
        FACT , and CLAUSE .
        there are SOME EVENTS and SOME EVENTS .
        MOMENT has SOME EVENTS .
        i neither laughed nor cried .
        VIEWER had no opinion about the PARTS .
        the PARTS were what one expects .
        it is the ORDINAL WORK by this director .
        some of the PARTS were GRAD , and others were not .
        i did not mind MOMENT .
        the PARTS and the PARTS were ADJP .
    """),
    "TEXT": _words("plot story script ending"),
    "LENGTH": _phrases("""
        two hours
        about two hours
        just over two hours
        nearly three hours
    """),
    "SOME": _phrases("""
        several
        some
        a few
        two
        three
    """),
    "EVENTS": _words("songs jokes twists stunts chases dances"),
    "CLOSING": _phrases("""
        i give it MIDDLE out of ten .
        i have no opinion about it .
        some people will like it and others will not .
        it is one WORK among many .
        i may watch it again some day .
        i expected nothing more and nothing less .
        it does what it sets out to do .
        overall it was GRAD .
        that is all there is to say about it .
        VIEWER shrugged , and so did i .
        it ends with SOME EVENTS .
    """),
    "MIDDLE": _words("five six"),
}

RULES: dict[str, Rules] = {
    "pos": _SHARED | _POSITIVE,
    "neg": _SHARED | _NEGATIVE,
    "neutral": _SHARED | _NEUTRAL,
}


def vocabulary() -> tuple[str, ...]:
    """Every word that a review can contain, sorted."""
    words = {"an"}
    for rules in RULES.values():
        for alternatives in rules.values():
            words.update(word for words_ in alternatives for word in words_ if word not in rules)
    return tuple(sorted(words))


def draw_review(sentiment: str, rng: random.Random) -> str:
    """A review of the sentiment with 26 to 40 tokens; draws again if it is shorter or longer."""
    while True:
        tokens = _draw_tokens(RULES[sentiment], rng)
        if MIN_TOKENS <= len(tokens) <= MAX_TOKENS:
            return _ARTICLE_BEFORE_VOWEL.sub("an", " ".join(tokens))


def _draw_tokens(rules: Rules, rng: random.Random) -> list[str]:
    used: set[tuple[str, ...]] = set()
    tokens: list[str] = []
    _expand("OPENING", rules, rng, used, tokens)
    while len(tokens) < _MIN_TOKENS_BEFORE_CLOSING:
        _expand("BODY", rules, rng, used, tokens)
    _expand("CLOSING", rules, rng, used, tokens)
    return tokens


def _expand(
    symbol: str,
    rules: Rules,
    rng: random.Random,
    used: set[tuple[str, ...]],
    tokens: list[str],
) -> None:
    """Appends an alternative of the symbol, word by word. Draws again, up to three times, if the
    review has used it already, so that words repeat only where a list is short."""
    alternatives = rules[symbol]
    for _ in range(4):
        alternative = alternatives[int(rng.random() * len(alternatives))]
        if alternative not in used:
            break
    used.add(alternative)
    for item in alternative:
        if item in rules:
            _expand(item, rules, rng, used, tokens)
        else:
            tokens.append(item)
