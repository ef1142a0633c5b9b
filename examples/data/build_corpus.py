"""Write corpus.jsonl.gz, the labelled sentences behind the demo, from the source distribution of vaderSentiment 3.3.2.

    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    python examples/data/build_corpus.py vaderSentiment-3.3.2.tar.gz

One JSON object a line: text, source ("movie" or "editorial"), mean (the mean human rating, -4 to 4), label (1: the mean
is above 0), split. The split depends on the text alone (movie) or on its document alone (editorial), so a sentence that
occurs twice never straddles it: of 20 buckets, 0-2 are "held_out", 3-4 "validation", the others "train". The movie
sentences come in the order of a hash (in the source the positive ones are first), the editorials in their own.
"""

import gzip
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "editorial": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}


def number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def split_of(key: str) -> str:
    """The split of a sentence with this key: a function of the key alone."""
    bucket = number(key) % 20
    return "held_out" if bucket < 3 else "validation" if bucket < 5 else "train"


def sentences(sdist: Path) -> list[dict]:
    """Every sentence of the two files, a repeated text only once."""
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile(ARCHIVE)
        if inner is None:
            raise ValueError(f"{sdist} has no {ARCHIVE}: expected the source distribution of vaderSentiment 3.3.2")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            tables = {source: archive.extractfile(name).read().decode("utf-8") for source, name in FILES.items()}
    rows, seen = [], set()
    for source, table in tables.items():
        for line in table.splitlines():
            identity, mean, text = line.split("\t", 2)
            text = " ".join(text.split())
            folded = "".join(c for c in text.lower() if c.isalnum())
            if not folded or folded in seen:
                continue
            seen.add(folded)
            key = folded if source == "movie" else "editorial " + identity.split("_")[0]
            rating = round(float(mean), 4)
            rows.append(
                {"text": text, "source": source, "mean": rating, "label": int(rating > 0), "split": split_of(key)}
            )
    movies = [row for row in rows if row["source"] == "movie"]
    return sorted(movies, key=lambda row: number("order " + row["text"])) + rows[len(movies) :]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(__file__).with_name("corpus.jsonl.gz")
    rows = sentences(Path(sys.argv[1]))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # No time stamp and no file name in the header: the same input gives the same bytes.
    with out.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", compresslevel=9, mtime=0, fileobj=raw) as file:
        file.write(text.encode())
    for source in FILES:
        for split in ("train", "validation", "held_out"):
            some = [row for row in rows if (row["source"], row["split"]) == (source, split)]
            print(f"{source:9} {split:10} {len(some):6} sentences, {sum(row['label'] for row in some):5} positive")
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
