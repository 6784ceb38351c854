"""Limits on a page's markup, checked before the extractor builds its tree.

Measured with resiliparse 2.0.1: an element takes up to 600 bytes; time is quadratic in the attributes of one tag
(21 000 take 4 s) and in the depth of DEEP elements (4000 take 0.3 s), and linear otherwise.
"""

import re

BYTES_A_TAG = 256  # a page may have one tag or comment per 256 bytes of max_document_bytes
FEWEST_TAGS = 50_000  # always allowed
MOST_ATTRIBUTES = 1000  # per tag
DEEPEST = 2000  # nested DEEP elements; browsers flatten deeper nesting than 512
DEEP = re.compile(r"<(/?)(?:div|article|section|main|ol|ul|rt)\b", re.IGNORECASE)
# A tag as browsers parse it: names end at a space, / or >, all of which a quoted value may contain. Possessive
# quantifiers avoid backtracking.
ATTRIBUTE = r"[\s/]*+(?:=[^\s/>=]*+|[^\s/>=]++)(?:\s*+=\s*+(?:\"[^\"]*+\"|'[^']*+'|(?![\"'])[^\s>]*+))?+"
MANY_ATTRIBUTES = re.compile(rf"<[a-zA-Z][^\s/>]*+(?:{ATTRIBUTE}){{{MOST_ATTRIBUTES + 1}}}")
SHORTEST_TAG = 2 * MOST_ATTRIBUTES  # characters of the shortest tag with too many attributes


def most_tags(most_bytes: int) -> int:
    """Maximum number of tags of a page, for max_document_bytes = `most_bytes`."""
    return max(FEWEST_TAGS, most_bytes // BYTES_A_TAG)


def structure_problem(html: str, most_bytes: int) -> tuple[str, str] | None:
    """(reason, detail) for a page that exceeds a limit, else None."""
    tags = html.count("<")
    if tags > (most := most_tags(most_bytes)):
        return "too_many_elements", f"{tags} tags, at most {most} for max_document_bytes={most_bytes}"
    if len(html) > SHORTEST_TAG and (tag := MANY_ATTRIBUTES.search(html)):
        return "too_many_attributes", f"more than {MOST_ATTRIBUTES} in the tag at character {tag.start()}"
    if tags > DEEPEST and (depth := _depth(html)) > DEEPEST:
        return "too_deep", f"{depth} elements inside one another, at most {DEEPEST}"
    return None


def _depth(html: str) -> int:
    """Maximum nesting depth of DEEP elements."""
    depth = deepest = 0
    for match in DEEP.finditer(html):
        depth = max(depth - 1, 0) if match[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest
