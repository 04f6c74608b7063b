"""The runner of the documentation's code finds what is wrong with a page."""

from pathlib import Path

import pytest

from tests.pages import Story, blocks_of


def run(text: str, folder: Path) -> Story:
    story = Story(Path("page.md"), folder)
    for block in blocks_of(text):
        story.run(block)
    return story


def test_blocks_share_names_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """
```toml title="a.toml"
x = 1
```

- in a list

  ```python
  import tomllib
  from pathlib import Path
  x = tomllib.loads(Path("a.toml").read_text())["x"]
  ```

<!-- test: 1000 -> 2 -->
```python
print("x is", x + 1000)
```

<!-- output -->
```text
...
x is 3
```
"""
    assert run(text, tmp_path).names["x"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nassert False, 'no'\n```\n", "no"),
        ("<!-- test: a=1 -> a=2 -->\n```python\nb = 1\n```\n", "does not hold 'a=1'"),
        ("```python\nprint(1)\n```\n\n<!-- output -->\n```text\n2\n```\n", "'2' is not in"),
        ("<!-- not run: -->\n```console\nrm x\n```\n", "say why"),
        ("```console\ncurl x\n```\n", "nothing runs 'curl x'"),
        ("```console\nidap compress nothing.toml\n```\n", "ended with 2"),
        ("```console\npip install 'idap[nonsense]'\n```\n", "no extra"),
        ("<!-- parsed: a run -->\n```console\nidap bench runs/x --batsh 1\n```\n", "No such option"),
        ("<!-- parsed: a run -->\n```console\nidap bensh runs/x\n```\n", "No such command"),
        ("```haskell\nmain\n```\n", "nothing runs 'haskell'"),
        ("```python\nx = 1\n", "not closed"),
    ],
)
def test_a_page_that_is_wrong_fails(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=message):
        run(text, tmp_path)


def test_a_reason_keeps_a_block_from_running(tmp_path):
    run("<!-- not run: two GPUs -->\n```python\n1 / 0\n```\n", tmp_path)


@pytest.mark.parametrize("mark", ["<!-- parsed: a run -->\n", "<!-- parsed here: a run -->\n\nwords\n\n"])
def test_commands_that_are_only_parsed_do_not_run(mark, tmp_path):
    assert run(mark + "```console\nidap bench runs/x --batch 1\n```\n", tmp_path).printed == ""


def test_a_traceback_names_the_line_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError) as caught:
        run("words\n\n```python\nx = 1\nx / 0\n```\n", tmp_path)
    assert caught.traceback[-1].lineno + 1 == 5
