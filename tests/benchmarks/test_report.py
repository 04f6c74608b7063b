"""The tables of the results are those that the committed files give."""

from benchmarks.report import PAGE, TABLES, pages


def test_pages_hold_the_tables_of_the_results():
    for page, text in pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: run python benchmarks/report.py"


def test_every_mark_of_a_page_is_written():
    names = {(table.page, table.name) for table in TABLES}
    assert len(names) == len(TABLES)
    for page, text in pages().items():
        marks = {line[5:-11] for line in text.splitlines() if line.startswith("<!-- ") and line.endswith(": begin -->")}
        assert marks == {name for of, name in names if of == page}


def test_the_first_table_stands_at_the_top():
    assert PAGE.read_text(encoding="utf-8").index("<!-- headline") < 1500
