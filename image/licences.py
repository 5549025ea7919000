"""List the licence of each package that is installed beside the Python that runs this, as the package declares it."""

from __future__ import annotations

from importlib.metadata import Distribution, distributions
from pathlib import Path


def licence(package: Distribution) -> str:
    """An SPDX expression where there is one, else the classifiers' words, else the first line of what stands there."""
    told = package.metadata.json  # lists where a field may come more than once
    if expression := told.get("license_expression"):
        return str(expression)
    classifiers = [one.split(" :: ") for one in told.get("classifier", ()) if one.startswith("License :: ")]
    if named := [parts[-1] for parts in classifiers if parts[-1] != "OSI Approved"]:
        return ", ".join(named)
    files = [file for file in package.files or () if file.name.upper().startswith(("LICENSE", "LICENCE"))]
    there = (Path(str(file.locate())) for file in files)
    texts = [str(told.get("license", "")), *(path.read_text(errors="replace") for path in there if path.is_file())]
    return next((text.strip().partition("\n")[0] for text in texts if text), "unknown")


def main() -> None:
    for one in sorted(distributions(), key=lambda one: one.name.lower()):
        print(f"{one.name:<40}{one.version:<16}{licence(one)}")


if __name__ == "__main__":
    main()
