"""Badges, Colab's install line and the citation, all made from ONE address: Repository in pyproject.toml.

    python tests/badges.py        # after changing the address or the branch there, or adding a notebook

rewrites the first cells of the notebooks, README.md and CITATION.cff; tests/test_launch.py holds them to what this makes.
"""

import json
import re
import tomllib
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ADDRESS = PROJECT["project"]["urls"]["Repository"]
BRANCH = PROJECT["tool"]["demem_lab"]["branch"]
EXTRAS = "attacks"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
_ONE = r"\[!\[Open in {0}\]\([^)]*\)\]\([^)]*\)"
_BADGES = re.compile(f"{_ONE.format('Binder')} {_ONE.format('Colab')}")
_INSTALL = re.compile(r'%pip install -q ".*? @ git\+.*?"')
_CITED = re.compile(r"^repository-code: .*$", re.M)


def links(notebook: str) -> tuple[str, str]:
    """Addresses that open `notebook` (its path in the repository) on Binder and on Colab."""
    owner_and_name = ADDRESS.removeprefix("https://github.com/")
    return (
        f"https://mybinder.org/v2/gh/{owner_and_name}/{BRANCH}?urlpath={quote(f'lab/tree/{notebook}', safe='')}",
        f"https://colab.research.google.com/github/{owner_and_name}/blob/{BRANCH}/{notebook}",
    )


def badges(notebook: str, images: str) -> str:
    """Both badges as Markdown; `images` is the folder of the pictures, seen from where the Markdown stands."""
    binder, colab = links(notebook)
    return f"[![Open in Binder]({images}/binder.svg)]({binder}) [![Open in Colab]({images}/colab.svg)]({colab})"


def install() -> str:
    """The line that installs the package on Colab."""
    return f'%pip install -q "demem_lab[{EXTRAS}] @ git+{ADDRESS}@{BRANCH}"'


def stamped(path: Path) -> str:
    """The content of a file of this repository with badges, install line and address as they must be."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return _notebook(json.loads(text), path.relative_to(ROOT).as_posix())
    if path.name == "README.md":
        return _BADGES.sub(badges("notebooks/00_start_here.ipynb", "notebooks/images"), text)
    return _CITED.sub(f"repository-code: {ADDRESS}", text)


def _notebook(content: dict, name: str) -> str:
    title, code = content["cells"][:2]
    source = "".join(title["source"])
    made = badges(name, "images")
    if _BADGES.search(source):
        source = _BADGES.sub(lambda _: made, source)
    else:
        first, _, rest = source.partition("\n")
        source = f"{first}\n\n{made}\n{rest}"
    title["source"] = source.splitlines(keepends=True)
    code["source"] = _INSTALL.sub(lambda _: install(), "".join(code["source"])).splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file in (*NOTEBOOKS, ROOT / "README.md", ROOT / "CITATION.cff"):
        new = stamped(file)
        if new != file.read_text(encoding="utf-8"):
            file.write_text(new, encoding="utf-8")
            print(f"rewrote {file.relative_to(ROOT)}")
