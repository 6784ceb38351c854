"""Canary texts: kinds of noise, and kinds of good text that looks odd, each made from a real document."""

import random
import re
from collections.abc import Callable

Maker = Callable[[str, random.Random], str]

# ruff: noqa: RUF001  (the letters of many languages)


def shuffled_words(text: str, generator: random.Random) -> str:
    words = text.split()
    generator.shuffle(words)
    return "\n".join(" ".join(words[at : at + 12]) for at in range(0, len(words), 12)) + "\n"


def mojibake(text: str, generator: random.Random) -> str:
    """UTF-8 read as another encoding, in a text with the accents and quotation marks of everyday writing."""
    marks = str.maketrans({"'": "’", '"': "”", "-": "—"})
    accented = re.sub(r"[eo]\b", lambda match: {"e": "é", "o": "ö"}[match.group()], text.translate(marks))
    return accented.encode().decode(generator.choice(["latin-1", "cp1252"]), errors="replace")


def near_duplicate(text: str, generator: random.Random) -> str:
    """A copy with a few words exchanged."""
    pieces = re.split(r"(\s+)", text)
    for place in generator.sample(range(0, len(pieces), 2), k=max(1, len(pieces) // 400)):
        pieces[place] = generator.choice(("however", "perhaps", "today", "indeed"))
    return "".join(pieces)


def keyboard(_: str, generator: random.Random) -> str:
    """Random strings of home-row keys."""
    keys = generator.choice(("asdfghjkl", "qwertzuiopasdfghjklyxcvbnm", "jkldfs", "asdfqwerzxcv"))
    words = ("".join(generator.choices(keys, k=generator.randint(3, 11))) for _ in range(generator.randint(80, 300)))
    return " ".join(words) + "\n"


LOGS = (
    "2026-0{a}-1{b} 1{a}:{b}{a}:0{b},{n} {level} [worker-{b}] {word}: handled {n} items in {a}.{b} ms",
    "Nov 1{b} 0{a}:1{b}:{b}{a} host{b} {word}[{n}]: connection from 10.0.{a}.{b} closed after {n} bytes",
    '10.{a}.{b}.1 - - [1{b}/Nov/2026:0{a}:1{b}:00 +0000] "GET /{word}/{n} HTTP/1.1" 200 {n}',
    "[{level}] {word}.service at step {n}: value={a}.{b}{n} state=0x{n}{a}f{b}",
)


def machine_log(_: str, generator: random.Random) -> str:
    form, lines = generator.choice(LOGS), []
    for _ in range(generator.randint(15, 60)):
        word = generator.choice(("scheduler", "cache", "auth", "storage", "gateway"))
        level = generator.choice(("INFO", "DEBUG", "WARNING", "ERROR"))
        a, b, n = generator.randint(1, 9), generator.randint(0, 9), generator.randint(10, 99_999)
        lines.append(form.format(a=a, b=b, n=n, word=word, level=level))
    return "\n".join(lines) + "\n"


FURNITURE = (
    "We use cookies to improve your experience. Accept all cookies or manage your choices.",
    "Home | Products | Prices | About us | Contact us",
    "Sign in or create an account to continue.",
    "Subscribe to our newsletter and never miss an offer.",
    "All rights reserved. Powered by {name}.",
    "Please enable JavaScript in your browser to view this page.",
    "Share on social media. Follow us for more.",
    "Read our privacy policy and the terms of service.",
    "Add to cart. Your shopping cart is empty.",
    "Skip to main content. Back to top.",
    "You may also like {name}.",
    "Customers who viewed {name} also viewed these.",
    "Loading, please wait.",
    "Page {number} of {total}",
)


def boilerplate(_: str, generator: random.Random) -> str:
    lines = generator.sample(FURNITURE, k=generator.randint(8, len(FURNITURE)))
    names = ("Lamps", "Garden", "Books", "Kettles", "Stationery")
    number = generator.randint(1, 500)
    return "\n".join(
        line.format(name=f"{generator.choice(names)} {number}", number=number, total=number + 7) for line in lines
    )


def repeated(text: str, generator: random.Random) -> str:
    sentence = max(re.split(r"(?<=[.!?])\s+", " ".join(text.split()))[:8], key=len)[:400]
    return f"{sentence}\n" * generator.randint(8, 40)


NOISE: dict[str, Maker] = {
    "shuffled_words": shuffled_words,
    "mojibake": mojibake,
    "near_duplicate": near_duplicate,
    "keyboard": keyboard,
    "machine_log": machine_log,
    "boilerplate": boilerplate,
    "repeated": repeated,
}


def passages(text: str, generator: random.Random) -> tuple[str, str]:
    """Two passages of a real document, a few sentences of each half, to enclose odd-looking text."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    half = len(sentences) // 2
    starts = generator.randrange(max(1, half - 3)), half + generator.randrange(max(1, len(sentences) - half - 3))
    first, second = (" ".join(sentences[start : start + 3])[:500] + "\n\n" for start in starts)
    return first, second


def poetry(text: str, generator: random.Random) -> str:
    """A poem from a document's words: short lines that begin with a capital, without end punctuation."""
    words = re.findall(r"[A-Za-z]{2,}", text)
    start, lines = generator.randrange(max(1, len(words) - 120)), []
    while start < len(words) and len(lines) < 16:
        size = generator.randint(4, 7)
        lines.append(" ".join(words[start : start + size]).capitalize() + generator.choice(("", ",", ";", " —")))
        start += size
        if len(lines) % 4 == 0:
            lines.append("")
    return "\n".join(lines) + "\n"


def tables(text: str, generator: random.Random) -> str:
    words = re.findall(r"[A-Za-z]{4,}", text)
    rows = [
        f"| {generator.choice(words)} | {generator.randint(1, 999)} | {generator.choice(words)} |" for _ in range(12)
    ]
    return (
        passages(text, generator)[0] + "\n".join(["| name | count | kind |", "|------|------:|------|", *rows]) + "\n"
    )


def code(text: str, generator: random.Random) -> str:
    names = re.findall(r"[a-z]{4,}", text)
    a, b, c = (generator.choice(names) for _ in range(3))
    block = (
        f"```python\ndef {a}_{b}({c}, limit={generator.randint(2, 99)}):\n    {b} = []\n    for item in {c}:\n"
        f"        if item % 2 == 0 and len({b}) < limit:\n            {b}.append(item ** 2)\n    return {b} or None\n"
        "```\n"
    )
    return (block + "\n").join(passages(text, generator))


def latex(text: str, generator: random.Random) -> str:
    n, m = generator.randint(2, 9), generator.randint(2, 9)
    formula = (
        f"\\begin{{equation}}\n\\int_0^{n} x^{m} e^{{-\\lambda x}} \\, dx = \\sum_{{k=1}}^{{{m}}} \\frac{{a_k}}{{k!}} "
        f"\\left( 1 - \\alpha_{{{n}}} \\right)^k\n\\end{{equation}}\nwhere $\\alpha_{{{n}}} < 1$ and $\\lambda \\in "
        f"\\mathbb{{R}}_+$ for every $k \\le {m}$.\n"
    )
    return (formula + "\n").join(passages(text, generator))


# The first article of the Universal Declaration of Human Rights.
DECLARATION = (
    "Mae pawb yn cael eu geni'n rhydd ac yn gydradd â'i gilydd mewn urddas a hawliau. Fe'u cynysgaeddir â rheswm a "
    "chydwybod, a dylai pawb ymddwyn y naill at y llall mewn ysbryd cymodlon.",
    "Gizon-emakume guztiak aske jaiotzen dira, duintasun eta eskubide berberak dituztela; eta ezaguera eta "
    "kontzientzia dutenez gero, elkarren artean senide legez jokatu beharra dute.",
    "Hver maður er borinn frjáls og jafn öðrum að virðingu og réttindum. Menn eru gæddir vitsmunum og samvisku, og ber "
    "þeim að breyta bróðurlega hverjum við annan.",
    "Saoláitear na daoine uile saor agus comhionann ina ndínit agus ina gcearta. Tá bauidh an réasúin agus an "
    "choinsiasa acu agus dlíd iad féin d'iompar de mheon bráithreachais i leith a chéile.",
    "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa. Wote wamejaliwa akili na dhamiri, hivyo yapasa watendeane "
    "kindugu.",
    "Kõik inimesed sünnivad vabadena ja võrdsetena oma väärikuselt ja õigustelt. Neile on antud mõistus ja "
    "südametunnistus ja nende suhtumist üksteisesse peab kandma vendluse vaim.",
    "Il-bnedmin kollha jitwieldu ħielsa u ugwali fid-dinjità u d-drittijiet. Huma mogħnija bir-raġuni u bil-kuxjenza u "
    "għandhom iġibu ruħhom ma' xulxin bi spirtu ta' aħwa.",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით. მათ მინიჭებული აქვთ გონება და "
    "სინდისი და ერთმანეთის მიმართ უნდა იქცეოდნენ ძმობის სულისკვეთებით.",
    "Tots els éssers humans neixen lliures i iguals en dignitat i en drets. Són dotats de raó i de consciència, i han "
    "de comportar-se fraternalment els uns amb els altres.",
    "Visi cilvēki piedzimst brīvi un vienlīdzīgi savā pašcieņā un tiesībās. Viņi ir apveltīti ar saprātu un "
    "sirdsapziņu, un viņiem jāizturas citam pret citu brālības garā.",
)


def minority_languages(_: str, generator: random.Random) -> str:
    """A declaration in a language with few speakers, with a date and a number to make copies differ."""
    article = generator.choice(DECLARATION)
    sentences = re.split(r"(?<=[.;])\s+", article)
    generator.shuffle(sentences)
    return f"{generator.randint(1, 28)}.{generator.randint(1, 12)}.{generator.randint(1950, 2025)}\n" + " ".join(
        sentences
    )


GOOD: dict[str, Maker] = {
    "poetry": poetry,
    "tables": tables,
    "code": code,
    "latex": latex,
    "minority_languages": minority_languages,
}
