"""Writes the data of the examples: wine.csv, digit_images/ (one folder a class), characters.csv.

    python recipes/example_data.py [FOLDER]
"""

import csv
import sys
import unicodedata
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits, load_wine

KINDS = {"Lu": "upper case", "Ll": "lower case", "Lo": "other letter", "Mn": "mark",
         "So": "symbol", "Sm": "mathematics", "Po": "punctuation", "Nd": "digit"}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    load_wine(as_frame=True).frame.to_csv(folder / "wine.csv", index=False)
    digits = load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = folder / "digit_images" / str(digit) / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15.9375).astype("uint8"))  # 0..16 to 0..255
        # Photographs have many sizes; so have these.
        image.resize((16 + number % 3 * 4, 16 + number % 2 * 4)).save(file)
    with (folder / "characters.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "kind"])
        for character in map(chr, range(0x20, 0x3000)):
            kind = KINDS.get(unicodedata.category(character))
            if kind is not None and unicodedata.name(character, ""):
                rows.writerow([unicodedata.name(character), kind])
    print(f"{folder / 'wine.csv'}  {folder / 'digit_images'}/0 to 9  {folder / 'characters.csv'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
