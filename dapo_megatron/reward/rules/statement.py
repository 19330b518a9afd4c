r"""This module finds where a response states its final answer.

A statement is a \boxed{}, an `<answer>` tag, GSM8K's last line `#### 34`, or the word "answer" (in one of several
languages) with a colon, as a heading, or with a verb and a value (`the answer is 34`, `34 is the answer`). The last
statement counts, so that a correction does; what stands before `</think>` is no statement. A box states what it
holds, anything else what follows up to the end of the line, the cell of a table, or the display block, in which its
value begins. Without a statement, the last sentence counts if it concludes (`_conclusion`).
"""

from __future__ import annotations

import re
import unicodedata

COMMANDS = (
    dict.fromkeys("\u00b7\u22c5", "cdot")
    | {"\u00d7": "times", "\u00b1": "pm", "\u2264": "le", "\u2265": "ge", "\u2248": "approx", "\u2208": "in"}
    | {"\u222a": "cup", "\u03c0": "pi", "\u03b8": "theta", "\u221e": "infty"}
)
SPELLINGS = str.maketrans(
    {sign: f"\\{name} " for sign, name in COMMANDS.items()}
    | dict.fromkeys("\u2212\u2013\ufe63", "-")  # minus, en dash, small hyphen
    | dict.fromkeys("\u201c\u201d\u300c\u300d\u3010\u3011", '"')  # quotes, and brackets around words
    | {"\u3002": ". ", "\u3001": ", ", "\u2019": "'", "\u00f7": "/", "\u221a": "sqrt", "\u00b0": r"^\circ "}
    | {"\u00b9": "^1", "\u00b2": "^2", "\u00b3": "^3", "\u00bc": " 1/4", "\u00bd": " 1/2", "\u00be": " 3/4"}
)
"""Signs that LaTeX or plain text spells otherwise. Full-width forms are left to Unicode's NFKC."""

WORDS = (
    r"answers?|final\s(?:result|solution)|(?<![^\W\d_])(?:ans\b\.?|r[ée]ponse|respuesta|resposta|risposta|antwort|antwoord|svar(?:et)?|odpowied[źz]"
    r"|cevap|jawaban|đáp\s(?:án|số)|ответ|відповідь|उत्तर|الإجابة|الجواب|תשובה)|答案|最[终終][结結]果|(?<![解回])答え?|정답|답"
)
RESULT = (
    r"(?:end\s?)?results?|solutions?(?:\sset)?|(?:grand\s)?total|conclusion|r[ée]sultat|ensemble\sdes\ssolutions|(?:end)?ergebnis"
    r"|l[öo]sung(?:en|smenge)?|insgesamt|resultado|soluci(?:ón|ones)|conclusi[óo]n|solução|soluções|conclusão|risultato"
    r"|soluzion[ei]|totale|resultaat|uitkomst|oplossing(?:en)?|resultat|wynik|rozwiązani[ea]|sonuç|hasil|kết\squả|итого?"
    r"|результат|решени[ея]|परिणाम|النتيجة|תוצאה|(?:最[终終])?[结結][果论論]|总计|解|합계|결과|해"
)
BE = (
    r"(?<![^\W\d_])(?:is|are|be|equals?|comes\s(?:out\s)?to|est|sont|es|son|é|são|è|sono|ist|sind|lautet|lauten|jest|są|är|là"
    r"|adalah|равен|равно)(?![^\W\d_])|是|为|為|は|는|은"
)
IS = rf"{BE}|=|\\approx"
AND = r"(?<![A-Za-z])(?:and|or|und|oder|et|ou)(?![A-Za-z])|和|或者?"
JUST = (
    r"(?:[\s,]*(?:(?<![^\W\d_])(?:therefore|thus|hence|then|so|of\scourse|clearly|indeed|in\sfact|again|finally|simply|just|only"
    r"|exactly|precisely|approximately|about|equal\sto|given\sby|donc|alors|ainsi|bien(?:\ssûr)?|également|exactement|simplement"
    r"|also|somit|daher|folglich|demnach|natürlich|genau|einfach|por\s(?:lo\s)?tanto|entonces|pues|así|simplemente"
    r"|exactamente|portanto|então|logo|exatamente|quindi|dunque|perciò|esattamente|dus|daarom|alltså|derfor|altså|więc|zatem"
    r"|jadi|maka|vậy|значит|поэтому|следовательно|отже)(?![^\W\d_])|所以|因此|就|即|따라서|したがって|よって))*,?"
)
# Like mathematics, not like prose.
VALUE = r"(?=[\s*_\"`:]*(?:[-+]?\s?(?:\.?\d|[\\$({\[|€£¥])|sqrt|(?!a\s)[A-Za-z](?![A-Za-z'])))"

LABEL = re.compile(
    rf"""<answer> | ^\#\#\#\#(?!.*\n\s*\S)
    | (?P<inverted>\b(?:is|are)\s(?:the|our|my)\s(?:final\s|correct\s)?answer\b)
    | (?:{WORDS})(?:
        (?P<gap>[^\n:.?!;|]{{0,60}}?)
        (?:(?P<colon>[\s*_"`)\]]{{0,8}}(?::|(?P<cell>\|)))
          | (?P<verb>\s?(?:{IS}){JUST}{VALUE}) | (?P<prose>\sis(?!\s+(?:not|never)\b)[\s,]))
      | (?P<heading>[*_"\ \t]{{0,8}}(?:\n|(?:->|→|-|\u2014)?{VALUE}))
    )""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
STARTS_A_LINE = re.compile(
    r"(?:[\s#*_>|\"(\[-]|the|my|our|final|correct|exact|short|so|thus|hence|therefore|and|,|la|le|die|最终|最後|所以|因此)*",
    re.IGNORECASE,
)
NOT_STATED = re.compile(
    r"\b(?:if|suppose|assum\w*|whether|unless|not|never|cannot|doubt|previous|first|initial|earlier|old|other|another|wrong)\b"
    r"|n't\b|\b(?:no\s(?:es|son)|non\s(?:è|sono)|não|не|nie)\b|不",
    re.IGNORECASE,
)
DECORATION = re.compile(r"[\s*_#\"`:]*")
DELIMITERS = {r"\[": r"\]", "$$": "$$", r"\(": r"\)"}

BLOCK = re.compile(r"\s*(?:\$\$.*?\$\$|\\\[.*?\\\]|```.*?```)", re.DOTALL)
RESULT_HEADING = re.compile(rf"^(\W{{0,9}}(?:{RESULT}))[*_: \t]{{0,9}}\n\s*", re.IGNORECASE | re.MULTILINE)
RESULT_LABEL = re.compile(rf"[\s#*_>|-]*(?:{RESULT})[^\w:|]{{0,9}}[:|]", re.IGNORECASE)
SENTENCE = re.compile(r"(?:(?<=[.!?])|(?<=[.!?]\*\*))\s+|\n+")
CHATTER = re.compile(
    r"\b(?:let me know|feel free|any (?:more |other |further )?questions|anything else|good luck|happy to)\b"
    r"|^\W*(?:i hope|thank you|thanks|would you like|do you (?:want|need|have)|if you (?:have|need|want|would|'d)"
    r"|check\b|verif|(?:we|you|i) can (?:check|verify))",
    re.IGNORECASE,
)
FINISHED = re.compile(r"(?:(?<!\.)[.!][*_\"')$]*|(?<!:)\*\*|\$\$|\\\]|```)$")
CLAUSE = re.compile(r";\s|,\s(?=(?:so|thus|hence|therefore|that|this|which|leaving|it)\s)", re.IGNORECASE)
CONCLUDES = re.compile(
    rf"(?:{BE}|(?<![^\W\d_])(?:leav(?:es?|ing)(?:\s(?:us|only|just|with|option|choice))*|gives?|yields?|makes?|totals|gets?"
    rf"|obtain|ha(?:ve|s)|costs?|takes?|needs?)(?![^\W\d_])):?{JUST}",
    re.IGNORECASE,
)
HENCE = re.compile(r"\s*(?:so|thus|hence|therefore|consequently|finally|altogether|in total)\b|\u2234", re.IGNORECASE)
SUPPOSED = re.compile(r"\b(?:if|suppose|assum\w*|let|case|example|e\.g)\b", re.IGNORECASE)
STEP = re.compile(
    r"\b(?:would|could|should|might|may|try|check|verify|find|solve|calculate|determine|consider|divid\w+|multipl\w+|subtract\w*"
    r"|add(?:ing)?|sides|next|now|step|because|why|how|what|half|twice|double|triple|third|quarter)\b",
    re.IGNORECASE,
)
BOLD = re.compile(r"\*\*(?!\s)([^*\n]{1,60}?)(?<![\s:])\*\*(?!\s*:)")
BARE = re.compile(rf"{VALUE}(?!\W*\d+[.)]\s)|\W*[^\W\d_]{{3,}}(?:[\s-][^\W\d_]{{3,}}){{0,3}}\W*$", re.IGNORECASE)
COMMAND = re.compile(r"\\(?:text|mathrm)\s*\{[^{}]*\}|\\[A-Za-z]+")
TERM = re.compile(r"[A-Za-z]\s*[-+*/^}]|[\d)+*/^-]\s*[A-Za-z]")
CALCULATION = re.compile(r"\d[\s)}]*(?:[-+*]|\\(?:div|times|cdot))[\s({]*\d")

BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|(?<!\\)[{}]")
TOGETHER = re.compile(rf"[\s$)(\\]*(?:,|;|{AND})[\s$)(\\]*(?:[A-Za-z]\s*=\s*)?")
GOES_ON = re.compile(r"[\s$)\\]*(?:or|dozen|hundred|thousand|million|billion)\b")


def final_answer(response: str) -> str | None:
    r"""Return the part of a response that states its answer; None where there is none, or where it is cut off.

    >>> final_answer("Thus x = 35. No, the answer is 34, since 2 * 17 = 34.")
    '34, since 2 * 17 = 34.'
    >>> final_answer(r"It is \boxed{\frac{1}{2}}, not \boxed{\frac{1}") is None
    True
    """
    text = spelled_out(response).rpartition("</think>")[2]
    box_start, boxed = _last_box(text)
    in_prose = None
    for label in reversed(list(LABEL.finditer(text, max(box_start, 0)))):
        stated = _before(text, label.start()) if label["inverted"] else _after(text, label.end())
        if stated and label["cell"]:
            stated = stated.partition("|")[0]
        if stated == "" or not _is_statement(text, label):
            continue
        if not _is_prose(text, label):
            return stated
        in_prose = in_prose or stated
    return (in_prose or _conclusion(text)) if box_start < 0 else boxed


def spelled_out(text: str) -> str:
    """Give each sign of `text` one spelling."""
    return unicodedata.normalize("NFKC", text.translate(SPELLINGS)).replace("\u2044", "/")


def _is_statement(text: str, label: re.Match[str]) -> bool:
    """Tell whether a label announces an answer, rather than denies, supposes or asks for one."""
    if label["heading"]:
        return _starts_a_line(text, label)
    if label["gap"] is None:  # a tag, ####, or an inverted sentence
        return True
    before = re.split(r"[.;:?!\n]\s?", text[max(0, label.start() - 100) : label.start()])[-1]
    end = re.search(r"[?\n]|\.\s", text[label.end() : label.end() + 100])
    return not NOT_STATED.search(before + label[0]) and not (end and end[0] == "?")


def _is_prose(text: str, label: re.Match[str]) -> bool:
    """Tell whether a label may be part of the reasoning (`check the answer: it is odd`), so that others go first."""
    if label["colon"]:
        return not _starts_a_line(text, label) and not re.compile(VALUE).match(text, label.end())
    return label["prose"] is not None


def _starts_a_line(text: str, label: re.Match[str]) -> bool:
    line = text[max(text.rfind("\n", 0, label.start()) + 1, label.start() - 100) : label.start()]
    return STARTS_A_LINE.fullmatch(line) is not None


def _after(text: str, start: int) -> str | None:
    """Return the line or display block in which a value begins; None where a delimiter is not closed."""
    match = DECORATION.match(text, start)
    assert match
    start = end = match.end()
    if closing := DELIMITERS.get(text[start : start + 2]):
        end = text.find(closing, start + 2)
        if end < 0:
            return None
    return text[start : text.find("\n", end) % (len(text) + 1)]


def _conclusion(text: str) -> str | None:
    """Return the only value of the last sentence; None where that may be a step, or cut off, or gives several."""
    tail = BLOCK.sub(lambda block: " " + " ".join(block[0].split()), text[-1000:])
    sentences = SENTENCE.split(RESULT_HEADING.sub(r"\1: ", tail))
    while sentences and (CHATTER.search(sentences[-1]) or not re.search(r"\w", sentences[-1])):
        sentences.pop()
    sentence = sentences[-1].strip() if sentences else ""
    if label := RESULT_LABEL.match(sentence):
        sentence = sentence[label.end() :].strip(" |*")
        if BARE.match(sentence) and not _is_unsolved(sentence):
            return sentence
    clause = CLAUSE.split(sentence)[-1]
    if not FINISHED.search(sentence) or SUPPOSED.search(sentence) or NOT_STATED.search(clause) or STEP.search(clause):
        return None
    bold, verbs, hence = list(BOLD.finditer(clause)), list(CONCLUDES.finditer(clause)), HENCE.match(clause)
    if bold:
        stated = clause[bold[0].start() :] if len(bold) == 1 and BARE.match(bold[0][1]) else ""
    elif verbs and BARE.match(clause, verbs[-1].end()):
        stated = clause[verbs[-1].end() :]
    else:
        stated = clause[hence.end() :] if hence else ""
    return stated if stated and not _is_unsolved(stated) else None


def _is_unsolved(text: str) -> bool:
    """Tell whether a name is left among other terms (`2x + 1 = 7`), or a calculation to be done (`x = 3 + 4`)."""
    sides = text.split("=")
    unsolved = len(sides) > 1 and TERM.search(COMMAND.sub("", sides[0]))
    return bool(unsolved or CALCULATION.search(sides[-1]))


def _before(text: str, end: int) -> str:
    """Return what a sentence says up to `end`."""
    return re.split(r"[.!?;]\s", text[max(text.rfind("\n", 0, end) + 1, end - 200) : end])[-1]


def _last_box(text: str) -> tuple[int, str | None]:
    """Find where the last box starts, -1 without one, and what it says; None if the text ends within it.

    Boxes with nothing but "and", "or" or a comma in between count as one, and so does what changes a box after it.
    """
    start, end = -1, 0
    waiting: list[int | None] = []  # braces that are open: where a box starts, None for any other
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            waiting.append(brace.start() if brace[0] != "{" else None)
        elif waiting and (box := waiting.pop()) is not None:
            between = text[end:box]
            start = start if start >= 0 and len(between) < 50 and TOGETHER.fullmatch(between) else box
            end = brace.end()
    if (cut_off := max((box for box in waiting if box is not None), default=-1)) >= end:
        return cut_off, None
    if start >= 0 and GOES_ON.match(text, end):
        end = text.find("\n", end) % (len(text) + 1)
    return start, text[start:end] if start >= 0 else None
