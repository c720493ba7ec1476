"""Is the response Faroese? A number from 0 (another language) to 1 (nothing speaks against Faroese).

The identifier is py3langid's (naive Bayes over byte n-grams), restricted to the languages that a student drifts into:
Faroese, Danish, Norwegian, Icelandic, Swedish and English. By itself it takes one Faroese sentence in twenty for
Icelandic, and one three-word answer in five for another language, so three kinds of evidence are added to its log-odds:
letters and spellings that a language does not have, and its commonest closed-class words. Proper names and figures
belong to no language and are left out; a response of nothing else scores 1, because a question may well ask for a name.
docs/faroese.md has the figures.

Pure functions of strings. The only file that is read is py3langid's own model, once; a dictionary comes in from outside
as a function that accepts words (training/teacher/reward_parts.py opens Hunspell's).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from py3langid.langid import MODEL_FILE, LanguageIdentifier

NEAR = ("fo", "da", "no", "nn", "is", "sv", "en")
"""ISO 639-1 codes; `no` is Bokmål."""
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")

OWN_LETTERS: Mapping[str, str] = {
    # Letters of a language's alphabet that words of its own are written with; all have a-z.
    "fo": "áðíóúýæø",
    "is": "áðéíóúýþæö",
    "da": "éæøå",
    "no": "éóòôæøå",
    "nn": "éóòôæøå",
    "sv": "éåäö",
    "en": "",
}
LETTER_WEIGHT = 4.0
"""Nats against a language for each word with a letter that it does not have."""
WORD_WEIGHT = 2.5
"""Nats against a language for each closed-class word of another one that it does not share."""
SPELLINGS: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    # What Faroese alone has (oyggj, sjógvur, hvørjum): against all others.
    (re.compile(r"oy|[óú]gv|ggj|^hvør"), ("da", "no", "nn", "is", "sv", "en")),
    # tjóð, -ligur, navn, hava, -ini, -aðu: Icelandic has þj-, -legur, -fn-, -f- between vowels, -inni, -uðu.
    (re.compile(r"^tj|lig(ur|t|a|ar|ir|an|um|u|i)$|vn|[aáeiíoóuúy]v[aið]|[^n](in|un)i$|aðu$|ks"), ("is",)),
    # What Faroese has lost or never had (hlutur, norður-ins, jafn, hafa, kominn, -legur, auk): against Faroese.
    (re.compile(r"(in|un|an|ön)n$|innar$|[^n]anna$|ins$|(in|un)ni$|uðu$|arnir$|é|þ"), ("fo",)),
    (re.compile(r"^h[rln]|fn|[aáeiíoóuúy]f[aiuð]|leg(ur|t|a|ar|ir|an|um|u|ri|ra|s)?$|au(?!gust|to)|x"), ("fo",)),
)
SPELLING_WEIGHT = 1.5
"""Nats against those languages for each word with such a spelling."""
PRIOR = 1.5
"""Nats for Faroese before anything is read: it is what was asked for."""
KNOWN, UNKNOWN = 0.25, -2.0
"""Nats for Faroese for each word that its dictionary has or lacks: neighbours share words, and it lacks compounds."""
SHARPNESS = 3.5
"""Factor on py3langid's calibrated log-odds."""

CLOSED_CLASS: Mapping[str, str] = {
    "fo": """ja nei ongin onga ongan
        og í á eg tú hann hon hetta tað tey teir tær vit tit ikki ella men sum at er eru var vóru verið verður vera
        verða vórðu varð hevur hava hevði høvdu havi við til frá av um fyri eftir undir yvir millum móti ímillum uttan
        innan ein ein eitt ein einum eini eina tann tær teimum teirra hennara hansara míni mín mítt tín títt sín sítt
        síni sína okkara tykkara hvør hvat hvar nær hví hvussu hvørjum har her nú tá tó eisini bara so mær tær sær meg
        teg seg honum henni kann kundi skal skuldi vil vildi fekk fáa fær gjørdi gjørt gera ger man mundi onkur øll
        allir allar alt onnur annar annað eingin einki nógv nógvir mest meira minni millum síðan fyrr fyrst ongantíð
        altíð enn aftur ikki uppá niður út inn hvørki hesin henda hesi hesum tí av tvey tvær tríggir tríggjar fýra fimm
        seks sjey átta níggju tíggju summir summar summi nakað nakar nakran nøkur nakrar aðrir aðrar flestu flestir
        soleiðis meðan við okkurt størri størsti størstu lítil stórur nýggjur nýtt gott góður fólk nevniliga hóast
        vegna hjá úr móti kring saman seinni seinast tíðliga dagin""",
    "is": """já nei margt margur margar
        og í á ég þú hann hún það þeir þær þau við þið ekki eða en sem að er eru var voru verið verður vera verða
        varð urðu hefur hafa hafði höfðu hafi með til frá af um fyrir eftir undir yfir milli móti án innan einn ein eitt
        einum einni eina eins sá sú þeim þeirra hennar hans minn mín mitt þinn þitt sinn sitt sína okkar ykkar hver hvað
        hvar hvenær hvers hvernig þar hér nú þá þó einnig bara svo mér þér sér mig þig sig honum henni getur gat skal
        mun vill vildi fékk fá fær gerði gert gera öll allir allar allt önnur annar annað enginn ekkert mjög margir mest
        meira minna síðan fyrr fyrst aldrei alltaf enn aftur upp niður út inn hvorki þessi þetta þessum þess því tvö
        tveir tvær þrír þrjú fjórir fjögur fimm sex sjö átta níu tíu úr hjá vegna samt líka þegar ef nema aðrir aðrar
        kann saman fólk gott góður nýtt lítil meðan flestir seinni dagin kring móti maður""",
    "da": """ja nej
        og i på jeg du han hun det de vi ikke eller men som at er var været bliver være blive blev har have havde
        med til fra af om for efter under over mellem mod uden en et den dem deres hendes hans min mit din dit sin sit
        sine vores jeres hvem hvad hvor hvornår hvorfor hvordan der her nu da dog også kun så mig dig sig ham hende kan
        kunne skal skulle vil ville fik få får gjorde gjort gøre gør man nogen alle alt anden andet andre ingen meget
        mange mest mere mindre siden før først aldrig altid endnu igen op ned ud ind denne dette disse to tre fire fem
        seks syv otte ni ti eller når hvis ved mens""",
    "no": """ja nei
        og i på jeg du han hun det de vi ikke eller men som at er var vært blir være bli ble har ha hadde med til
        fra av om for etter under over mellom mot uten en ei et den dem deres hennes hans min mitt din ditt sin sitt
        sine vår vårt deres hvem hva hvor når hvorfor hvordan der her nå da dog også bare så meg deg seg ham henne kan
        kunne skal skulle vil ville fikk få får gjorde gjort gjøre gjør man noen alle alt annen annet andre ingen mye
        mange mest mer mindre siden før først aldri alltid ennå igjen opp ned ut inn denne dette disse to tre fire fem
        seks sju åtte ni ti hvis ved mens""",
    "nn": """ja nei
        og i på eg du han ho det dei vi me ikkje eller men som at er var vore blir vere bli blei vart har ha hadde
        med til frå av om for etter under over mellom mot utan ein ei eit den deira hennar hans min mitt din ditt sin
        sitt sine vår vårt dykkar kven kva kor kvar når kvifor korleis der her no da òg også berre så meg deg seg henne
        kan kunne skal skulle vil ville fekk få får gjorde gjort gjere gjer ein nokon alle alt annan anna andre ingen
        mykje mange mest meir mindre sidan før først aldri alltid enno igjen opp ned ut inn denne dette desse to tre
        fire fem seks sju åtte ni ti viss ved medan""",
    "sv": """och i på jag du han hon det de vi inte eller men som att är var varit blir vara bli blev har ha hade med
        till från av om för efter under över mellan mot utan en ett den dem deras hennes hans min mitt din ditt sin sitt
        sina vår vårt vem vad var när varför hur där här nu då dock också bara så mig dig sig honom henne kan kunde ska
        skulle vill ville fick få får gjorde gjort göra gör man någon alla allt annan annat andra ingen mycket många
        mest mer mindre sedan före först aldrig alltid ännu igen upp ner ut in denna detta dessa två tre fyra fem sex
        sju åtta nio tio vid medan""",
    "en": """yes
        and in on i you he she it they we not or but who that is are was were been be has have had with to from of
        about for after under over between against without a an the them their her his my your our this these those
        what where when why how there here now then also only so me him can could shall should will would got get did
        done do one all other another no none very many most more less since before first never always yet again up
        down out into two three four five six seven eight nine ten which by at as if than""",
}
_VOCABULARY = {language: frozenset(words.split()) for language, words in CLOSED_CLASS.items()}
_CLOSED = frozenset().union(*_VOCABULARY.values())


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    """py3langid's model with the near languages only, about a second to load."""
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(NEAR)
    return identifier


def common_words(text: str) -> list[str]:
    """The words that can tell a language: no figures, and no proper names.

    A name is a word with a capital that is no closed-class word. The first word of a text with small letters may have
    its capital from its place, so it is a name only where it comes again with one, or where a name follows.
    """
    words = WORD.findall(unicodedata.normalize("NFC", text))
    if text.isupper():
        return [word.lower() for word in words]  # a heading: capitals say nothing
    small = [word for word in words if word.islower()]
    kept = []
    for n, word in enumerate(words):
        is_name = word[0].isupper() and word.lower() not in _CLOSED
        starts_name = n + 1 < len(words) and words[n + 1][0].isupper() and words[n + 1].lower() not in _CLOSED
        if not is_name or (n == 0 and small and word not in words[1:] and not starts_name):
            kept.append(word.lower())
    return kept


def identify(text: str, accepts: Callable[[str], bool] | None = None) -> dict[str, float]:
    """Probability of each near language (they sum to 1); all equal where the text has no word that could tell.

    Naive Bayes log-posteriors of py3langid, divided by the square root of the number of bytes (its own calibration),
    plus the evidence of letters, spellings and closed-class words above, and of a dictionary (`accepts`).
    """
    words = common_words(text)
    if not words:
        return dict.fromkeys(NEAR, 1 / len(NEAR))
    joined = " ".join(words)
    ranked = dict(_identifier().rank(joined))
    # Nothing but words that languages share, in which the bytes tell nothing; or no byte sequence that is known (one
    # floor for all, too low to add to).
    if _VOCABULARY["fo"].issuperset(words) or len(set(ranked.values())) == 1:
        ranked = dict.fromkeys(NEAR, 0.0)
    scale = SHARPNESS / math.sqrt(len(joined.encode()))
    scores = np.array([ranked[language] * scale + _evidence(words, language) for language in NEAR])
    if accepts is not None:
        scores[NEAR.index("fo")] += sum(KNOWN if accepts(word) else UNKNOWN for word in words)
    odds = np.exp(scores - scores.max())
    return dict(zip(NEAR, (odds / odds.sum()).tolist(), strict=True))


def _evidence(words: list[str], language: str) -> float:
    """Nats for a language from the prior, letters it does not have, others' closed-class words and spellings."""
    letters, known = OWN_LETTERS[language], _VOCABULARY[language]
    others = [pattern for pattern, against_these in SPELLINGS if language in against_these]
    against = -PRIOR if language == "fo" else 0.0
    for word in words:
        if any(not "a" <= char <= "z" and char.isalpha() and char not in letters for char in word):
            against += LETTER_WEIGHT
        if word in _CLOSED and word not in known:
            against += WORD_WEIGHT
        if any(pattern.search(word) for pattern in others):
            against += SPELLING_WEIGHT
    return -against


def script_share(text: str) -> float:
    """Share of the letters that are Latin ones; 1 where there is none (figures are written alike everywhere)."""
    letters = [char for char in text if char.isalpha()]
    latin = sum(unicodedata.name(char, "").startswith("LATIN") for char in letters)
    return latin / len(letters) if letters else 1.0


def language_score(text: str, accepts: Callable[[str], bool] | None = None) -> float:
    """0..1: probability that the text is Faroese, times the share of Latin letters.

    An empty response scores 0. One of names, figures and signs alone scores its share of Latin letters: nothing in it
    speaks against Faroese. Text that is mostly figures beside a few words of another
    language is judged by those words. With `accepts` (a dictionary) each word is evidence, and a response without a
    single known word keeps half of its score at most, in proportion to the share of common words that are known.
    """
    if not any(char.isalnum() for char in text):
        return 0.0
    script = script_share(text)
    words = common_words(text)
    if not words:
        return script
    score = identify(text, accepts)["fo"]
    if accepts is not None:
        score *= (1 + sum(accepts(word) for word in words) / len(words)) / 2
    return score * script
