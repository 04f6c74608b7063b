"""What a public repository needs is there and agrees with the package."""

import re
import tomllib

from tests.pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_licence_is_the_one_that_the_package_names() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_citation_names_this_version_and_the_paper() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    said = dict(re.findall(r"^([a-z-]+): (\S.*)$", text, flags=re.MULTILINE))
    assert said["cff-version"] == "1.2.0"
    assert (said["title"], said["version"], said["license"]) == ("idap", PROJECT["version"], PROJECT["license"])
    assert f"- name: {PROJECT['authors'][0]['name']}\n" in text
    assert "arXiv:2511.20141" in text


def test_pre_commit_runs_what_make_check_runs() -> None:
    hooks = re.findall(
        r"^ +entry: \.venv/bin/(.+)$",
        (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    target = re.search(r"^check:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert target is not None
    assert hooks == re.findall(r"^\t\$\(BIN\)/(.+)$", target[1], flags=re.MULTILINE)


def test_links_of_the_root_pages_lead_to_files() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\(((?!https?:)[^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
        assert links
        for link in links:
            assert (ROOT / link).exists(), f"{name}: {link}"
