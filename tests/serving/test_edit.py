import pytest
from hypothesis import given
from hypothesis import strategies as st

from kindling.serving.edit import Edit, EditText


def shown(edit: Edit, *pieces: str, complete: bool = True) -> str:
    """Return what is said of a text that comes in pieces, up to where a rule ends it."""
    text, said = EditText(edit), ""
    for piece in pieces:
        said += text.add(piece)
        if text.ended:
            break
    return said + text.finish(complete)


CASES = {
    "everything that breaks no rule": (Edit("x = "), "f(a, b)", "f(a, b)"),
    "one line": (Edit("x = ", max_lines=1), "f()\ny = 2\n", "f()"),
    "two lines": (Edit("x = ", max_lines=2), "f()\n\ny = 2\nz", "f()\n\ny = 2"),
    "the first line with anything in it": (Edit("def f():", max_lines=1), "\n\n    return 1\n", "\n\n    return 1"),
    "the end of an indented block": (
        Edit("    if a:", stop_at_dedent=True),
        "\n        b()\n\n    c()\nd()\n",
        "\n        b()\n\n    c()",
    ),
    "a blank line in a block": (Edit("    ", stop_at_dedent=True), "a()\n\n    b()", "a()\n\n    b()"),
    "a block indented with tabs": (Edit("\tif a:", stop_at_dedent=True), "\n\t\tb()\n}", "\n\t\tb()"),
    "all lines at no indentation": (Edit("a", stop_at_dedent=True), "b\nc\nd", "b\nc\nd"),
    "a bracket that is there": (Edit("    print(", ")\n    return x\n"), '"a")', '"a"'),
    "a bracket that is needed twice": (Edit("    print(f(", ")\n"), "x)", "x)"),
    "brackets that are there, with what follows": (Edit("f(g(", "))\n"), "x))\n", "x"),
    "the rest of a line": (Edit("a, ", ", c, d\n"), "b, c", "b"),
    "a line that comes next": (Edit("    x = ", "\n    return x\n"), "1\n    return x\n\nmore", "1"),
    "a line that comes after blank lines": (Edit("    x = ", "\n\n\n    return x\n"), "1\n\n    return x\nmore", "1"),
    "a bracket and the next line": (Edit("f(", ")\ng()\n"), "1)\ng()\nh()", "1"),
    "a line that only begins as the next": (Edit("a", "\nreturn x\n"), "\nreturn x + 1\nb", "\nreturn x + 1\nb"),
    "a line that is the next but for its indentation": (Edit("if a:", "\n}\n"), "\n    }\nb", "\n    }\nb"),
    "a first line that is the next line": (Edit("a\n    ", "\n    return x\n"), "return x\n", ""),
    "a line before the one that the cursor begins": (
        Edit("a\n", "    return x\n"),
        "    b()\n    return x\n",
        "    b()\n",
    ),
    "lines before the one that the cursor begins": (
        Edit("a\n    ", "return x\n"),
        "b()\n    c()\n    return x\n",
        "b()\n    c()\n    ",
    ),
    "a word that ends as the suffix begins": (Edit("foo(", "a, b)\n"), "data, ", "data, "),
    "a number that ends as the suffix begins": (Edit("range(", "0, 10)\n"), "10", "10"),
    "a name that ends as the suffix begins": (Edit("x = ", "x_old\n"), "max", "max"),
    "the rest of a line that begins inside a word": (Edit("def ", "e_score(x):\n"), "compute_score(x):", "comput"),
    "the end of a word that the suffix goes on with": (Edit("pri", "nt(x)\n"), "nt(", ""),
    "a quote that is needed": (Edit("", '"b"]\n'), '["a"', '["a"'),
    "a quote that is there": (Edit('print("', '")\n'), 'hello"', "hello"),
    "a quote and a bracket that are there": (Edit('print("', '")\n'), 'hello")', "hello"),
    "only up to the rest of the line": (Edit("def f(", "):\n    return x\n"), "a, b):\n    y = 1\n    z", "a, b"),
    "only up to a part of the rest": (Edit("x = f(", ") + 1\n"), "a)\ny = 2", "a"),
    "one line before an operator": (Edit("x = ", " + 1\n"), "foo()\ny = 2", "foo()"),
    "one line before a bracket that is needed twice": (Edit("print(f(", ")\n"), "x)\nfoo()\n", "x)"),
    "a block before the bracket that ends it": (
        Edit("then(() => {", "})\n"),
        "\n  if (a) {\n    b\n  }\n  c\n})\nd",
        "\n  if (a) {\n    b\n  }",
    ),
    "only white space": (Edit("a"), "\n   \n\t", ""),
    "only the suffix": (Edit("f(", ")"), ")", ""),
    "a newline that the suffix has": (Edit("a = ", "\nb\n"), "1\n", "1"),
}


@pytest.mark.parametrize("edit, text, expected", CASES.values(), ids=CASES)
def test_shown_is(edit, text, expected):
    assert shown(edit, text) == expected
    assert shown(edit, *text) == expected, "one character at a time"


def test_at_a_limit_a_line_that_may_become_the_next_one_is_left_out():
    edit = Edit("    x = ", "\n\n    return x\n")
    assert shown(edit, "1\n    retu", complete=False) == "1"
    assert shown(edit, "1\n    retu", complete=True) == "1\n    retu"


def test_text_is_held_back_only_while_it_may_be_taken_away():
    text = EditText(Edit("f(", ")\nreturn x\n"))
    assert [text.add(c) for c in ("a", ")", " ", "+(", "\n", "ret", "ry")] == ["a", "", "", ") +(", "", "", "\nretry"]


short = st.text("ab ()\n\t", max_size=12)
edits = st.builds(
    Edit, prefix=short, suffix=short, max_lines=st.none() | st.integers(1, 3), stop_at_dedent=st.booleans()
)


@given(edits, st.lists(short, max_size=6), st.booleans())
def test_pieces_do_not_matter_and_the_rules_hold(edit, pieces, complete):
    whole = "".join(pieces)
    said = shown(edit, *pieces, complete=complete)
    assert said == shown(edit, whole, complete=complete) == shown(edit, *whole, complete=complete)
    assert whole.startswith(said) and (said == "" or said.strip())
    if edit.max_lines is not None:
        assert sum(bool(line.strip()) for line in said.split("\n")) <= edit.max_lines


@given(st.text("ab, ", max_size=12), st.text("ab, ", max_size=4))
def test_the_longest_beginning_of_the_suffix_is_cut_from_the_end(text, suffix):
    def is_repeated(n: int) -> bool:
        inside_word = 0 < n < len(text) and text[-n - 1] in "ab" and text[-n] in "ab"
        return text.endswith(suffix[:n]) and (not inside_word or n >= len(suffix.rstrip()))

    kept = text[: len(text) - max(n for n in range(min(len(suffix), len(text)) + 1) if n == 0 or is_repeated(n))]
    assert shown(Edit("x", suffix), text) == (kept if kept.strip() else "")


def test_a_long_text_before_a_long_suffix_is_read_once():
    class Read(str):
        n = 0

        def __getitem__(self, key):
            Read.n += 1
            return str.__getitem__(self, key)

    text = EditText(Edit("x", Read("a" * 3000 + "b")))
    for _ in range(1000):
        text.add("aa ")
    assert Read.n < 30_000
