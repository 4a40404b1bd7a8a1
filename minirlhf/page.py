"""Pieces of a self-contained HTML page. What comes from files passes through `shown`, and nothing else escapes it.

No scripts, no network: the content security policy forbids both even if an escape were missed.
"""

import html
import unicodedata
from collections.abc import Iterable, Sequence

MAX_TEXT = 2000  # characters of one text
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light; --line: #ddd; --soft: #f6f6f4; --dim: #666; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: #fff; color: #1a1a1a; overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: .8rem 0 .4rem; }
p { margin: .4rem 0; max-width: 48rem; }
.dim, figcaption { color: var(--dim); font-size: .85rem; }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); margin: 1rem 0; }
.tile { background: var(--soft); border-radius: .4rem; padding: .5rem .7rem; }
.tile b { display: block; font-size: 1.1rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.grid { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figure h3 { margin: 0; }
.box { overflow-x: auto; margin: .5rem 0; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: break-word; }
thead th { border-top: 0; background: var(--soft); white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
table.even { table-layout: fixed; min-width: calc(12rem * var(--columns)); }
td.said { white-space: pre-wrap; overflow-wrap: anywhere; }
.short { min-width: 14rem; max-width: 34rem; overflow-wrap: anywhere; }
tr.asked th { background: var(--soft); font-weight: 600; white-space: pre-wrap; }
.numbers { display: block; color: var(--dim); font-size: .8rem; white-space: normal; margin-top: .2rem; }
.code { color: #a33; font-size: .85em; }
.empty { color: var(--dim); font-style: italic; }
.red { color: #b00020; font-weight: 600; } .amber { color: #8a5a00; font-weight: 600; } .green { color: #1b6e3c; }
.alarms { list-style: none; margin: .5rem 0; padding: .1rem .9rem; border-left: 4px solid #b00020;
  background: #fdf2f3; }
.settings { columns: 21rem; column-gap: 1.2rem; }
.settings section { break-inside: avoid; padding-bottom: .6rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .box { overflow: visible; } table.even, .short { min-width: 0; } thead th, td.n { white-space: normal; }
  tr, .even tbody { break-inside: avoid; } h2 { break-after: avoid; } .grid { grid-template-columns: 1fr 1fr; }
}
"""
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories that can hide, reorder or break a text


def page(title: str, body: Iterable[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{shown(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def spelled(text: object, plain: str = "") -> str:
    """Text in which every invisible character is spelled out, ⟨U+202E⟩, but for those of `plain`; line ends stay, and
    are marked with ⏎."""
    return "".join(c if c in plain else _spell(c) for c in str(text))


def _spell(c: str) -> str:
    if c == "\n":
        return "⏎\n"
    return f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in INVISIBLE else c


def shown(text: object) -> str:
    """Any text as HTML text: at most MAX_TEXT characters, invisible ones spelled out, escaped."""
    whole = str(text)
    rest = len(whole) - MAX_TEXT
    return html.escape(spelled(whole[:MAX_TEXT])) + (f"… ({rest:,} more characters)" if rest > 0 else "")


def number(x: object, digits: int = 4) -> str:
    """So many digits of a float, all of an int; a dash for what is missing."""
    if x is None:
        return "–"
    if isinstance(x, bool) or not isinstance(x, int | float):
        return shown(x)
    if isinstance(x, int):
        return f"{x:,}" if abs(x) < 10**15 else shown(x)
    return f"{x:,.0f}" if 1e4 <= abs(x) < 1e9 else f"{x:.{digits}g}".replace("-", "−")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, numeric: Sequence[int] = ()) -> str:
    """Cells are HTML already; `numeric` columns are set to the right. Wide tables scroll inside their box."""

    def row(cells: Sequence[str], tag: str) -> str:
        marks = (' class="n"' if i in numeric else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{m}>{c}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if any(head) else ""
    return box(f"{top}<tbody>{''.join(row(r, 'td') for r in rows)}</tbody>", label)


def box(rows: str, label: str, even: int = 0) -> str:
    """A table that scrolls inside its box, with the keyboard too; `even`: so many columns of equal width."""
    name = shown(label)
    marks = f' class="even" style="--columns: {even}"' if even else ""
    opening = f'<div class="box" role="region" tabindex="0" aria-label="{name}"><table aria-label="{name}"{marks}>'
    return f"{opening}{rows}</table></div>"


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it; nothing when there is nothing."""
    found = [part for part in parts if part]
    return "\n".join([f"<section><h2>{shown(title)}</h2>", *found, "</section>"]) if found else ""


def figure(svg: str, title: str, caption: str) -> str:
    """A drawing with its words."""
    return f"<figure><h3>{shown(title)}</h3>{svg}<figcaption>{shown(caption)}</figcaption></figure>"
