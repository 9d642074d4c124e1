"""The pages of the site: the reference of keys is whole, and every link leads somewhere."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hydra.utils import get_class
from pydantic import Field

from rlhf_exp.settings import settings
from tests import docs_pages
from tests.conf_comments import CONF, options

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("site")
    docs_pages.gather(folder)
    assert (folder / "reviews.png").is_file()
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}


def test_every_key_of_every_class_is_in_the_reference(site: dict[str, str]) -> None:
    keys = set(re.findall(r"^\| `([\w.]+)` \|", site["keys.md"], flags=re.M))
    for path in options():
        group = path.parent.relative_to(CONF).as_posix().replace("/", ".")
        kind = get_class(yaml.safe_load(path.read_text(encoding="utf-8"))["_target_"])
        nested = {folder.name for folder in path.parent.iterdir() if folder.is_dir()}
        for field in dataclasses.fields(kind):
            if field.name in nested:
                continue  # a group, whose keys are those of its own classes
            key = f"{group}.{field.name}"
            assert key in keys or any(other.startswith(f"{key}.") for other in keys), key
    assert {"seed", "resume_with", "stage.kl_coef", "stage.guards.max_kl_sum"} <= keys


def test_a_row_has_default_values_and_meaning(site: dict[str, str]) -> None:
    for row in (
        r"`stage\.clip_coef` \| the ratio .* \| `0\.2` \| number above 0, below 1",
        r"`stage\.value_clip_coef` \| the value loss .* \| `null` \| number above 0 or `null`",
        r"`intervention\.path` \| a safetensors .* \| required \| text",
        r"`stage\.kl_penalty` \| loss: exact .* \| `loss` \| `loss`, `loss_k3`, `reward`, `return`",
    ):
        assert re.search(rf"^\| {row} \|$", site["keys.md"], flags=re.M), row


@settings
class Undocumented:
    documented: int = 1
    """Some number."""
    forgotten: int = 1


def test_a_key_without_documentation_is_named() -> None:
    with pytest.raises(ValueError, match=r"stage\.forgotten: the field of Undocumented needs"):
        list(docs_pages.key_rows(Undocumented, "stage"))


def test_what_a_field_takes_is_said() -> None:
    assert docs_pages.takes(Annotated[int, Field(ge=1, lt=3)]) == "integer at least 1, below 3"
    assert docs_pages.takes(tuple[Literal["a", 2], ...] | None) == "list of `a`, `2` or `null`"


def headings(text: str) -> set[str]:
    """The anchors that MkDocs makes of a page's headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", prose, flags=re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in heads}


def test_links_lead_to_pages_and_headings(site: dict[str, str]) -> None:
    links = [
        (page, link) for page, text in site.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)
    ]
    assert len(links) >= 40
    for page, link in links:
        target, _, anchor = link.partition("#")
        if "://" in target or target.endswith(".png"):
            continue
        text = site[target] if target else site[page]
        assert not anchor or anchor in headings(text), f"{page}: {link}"


def test_the_navigation_has_every_page(site: dict[str, str]) -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(re.findall(r"[\w]+\.md", str(settings["nav"]))) == sorted(site)
    assert settings["strict"] is True
    assert settings["theme"]["font"] is False
