"""What the markup of a page may hold, counted before the extractor builds a tree of it.

Measured with resiliparse 2.0.1: an element takes up to 600 bytes; time grows with the square of the attributes of one
tag (21 000 take 4 s), and with the square of the depth of DEEP elements (4000 take 0.3 s). All else is linear.
"""

import re

BYTES_A_TAG = 256  # of max_document_bytes, for each tag and comment that a page may have
FEWEST_TAGS = 50_000  # are always allowed
MOST_ATTRIBUTES = 1000  # of one tag
DEEPEST = 2000  # DEEP elements inside one another; browsers flatten what is deeper than 512
DEEP = re.compile(r"<(/?)(?:div|article|section|main|ol|ul|rt)\b", re.IGNORECASE)
# A tag as a browser reads it: names end at a space, / or >, and a quoted value may hold all three. Possessive, so that
# an attribute is read once.
ATTRIBUTE = r"[\s/]*+(?:=[^\s/>=]*+|[^\s/>=]++)(?:\s*+=\s*+(?:\"[^\"]*+\"|'[^']*+'|(?![\"'])[^\s>]*+))?+"
MANY_ATTRIBUTES = re.compile(rf"<[a-zA-Z][^\s/>]*+(?:{ATTRIBUTE}){{{MOST_ATTRIBUTES + 1}}}")
SHORTEST_TAG = 2 * MOST_ATTRIBUTES  # characters of a tag with more attributes


def most_tags(most_bytes: int) -> int:
    """Tags that a page may have where documents have at most so many bytes."""
    return max(FEWEST_TAGS, most_bytes // BYTES_A_TAG)


def structure_problem(html: str, most_bytes: int) -> tuple[str, str] | None:
    """(reason, detail) of a page that holds too much; None for one that may be extracted."""
    tags = html.count("<")
    if tags > (most := most_tags(most_bytes)):
        return "too_many_elements", f"{tags} tags, at most {most} for max_document_bytes={most_bytes}"
    if len(html) > SHORTEST_TAG and (tag := MANY_ATTRIBUTES.search(html)):
        return "too_many_attributes", f"more than {MOST_ATTRIBUTES} in the tag at character {tag.start()}"
    if tags > DEEPEST and (depth := _depth(html)) > DEEPEST:
        return "too_deep", f"{depth} elements inside one another, at most {DEEPEST}"
    return None


def _depth(html: str) -> int:
    """How many DEEP elements lie inside one another at most."""
    depth = deepest = 0
    for match in DEEP.finditer(html):
        depth = max(depth - 1, 0) if match[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest
