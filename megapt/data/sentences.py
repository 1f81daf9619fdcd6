"""Text cut into sentences by a few rules; the sentences end to end are the text again, to the character."""

from __future__ import annotations

import re

# A sentence ends
#  - behind a full stop, question mark, exclamation mark or ellipsis, with the quotation marks and brackets that close
#    there, where white space follows and then anything but a small letter;
#  - behind such a mark of Chinese and Japanese, with what closes there, wherever it stands;
#  - at the end of a line.
# White space between sentences begins the second of the two, as byte-level tokens want it; a line's end, and blank
# lines after it, belong to their line. Nothing here backtracks: time is linear in the text.
_END = re.compile(
    r"""(?<![.?!…])(?P<stop>[.?!…]++)["'”’»)\]]*+(?=[^\S\n]++(?P<next>\S))"""
    r"""|[。！？｡]++[」』）”’]*+"""
    r"""|\n(?:[^\S\n]*+\n)*+"""
)

# Words after which a full stop ends no sentence.
_SHORT = frozenset(
    "Mr Mrs Ms Dr Prof Sr Jr St Gen Col Lt Sgt Capt Rev Hon Sen Rep Gov Pres Mt Fig Figs Eq Eqs No Nos Vol vol Ch Sec "
    "vs cf al eg ie e.g i.e pp ed eds approx ca Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec".split()
)
_WORD = re.compile(r"[\w.]*\Z")
_LONGEST = 16  # characters looked at for such a word


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, white space included: `"".join(split_sentences(text)) == text`.

    A full stop ends no sentence after a title or abbreviation of a short English list, after a single capital letter
    (J. S. Bach), or before a small letter. An empty text has no sentences.
    """
    sentences: list[str] = []
    start = 0
    for found in _END.finditer(text):
        following = found["next"]
        if following is not None and (following.islower() or (found["stop"] == "." and _is_short(text, found.start()))):
            continue
        if text[start:found.end()].isspace():
            continue
        sentences.append(text[start:found.end()])
        start = found.end()
    rest = text[start:]
    if sentences and (not rest or rest.isspace()):
        sentences[-1] += rest
    elif rest:
        sentences.append(rest)
    return sentences


def _is_short(text: str, stop: int) -> bool:
    found = _WORD.search(text, max(0, stop - _LONGEST), stop)
    word = found[0] if found else ""
    initial = word[-1:].isupper() and (len(word) == 1 or word[-2] == ".")
    return word in _SHORT or initial
